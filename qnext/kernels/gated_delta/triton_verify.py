"""DeltaNet rows that may be rejected later (MTP verify): replay, store once, run ahead.

A step brings a few rows of every sequence, the last of them drafts. Writing a state after every
row would cost as many states of traffic; here the state is read once and written once per step.
What is written is the state after the rows that turned out to be accepted in the step before,
replayed from the small tensors kept of them (keys, values, decays, betas); the new rows run on it
in registers only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qnext.errors import KernelError
from qnext.kernels.gated_delta.triton_decode import _silu


@triton.jit
def _conv(
    qkv, ring, conv_weight, channel, position, s_qkv, R: tl.constexpr, RING: tl.constexpr
):  # fmt: skip
    """Convolution of new row R of a sequence: its taps lie in the new rows or in the ring."""
    acc = tl.load(qkv + R * s_qkv + channel).to(tl.float32)
    acc *= tl.load(conv_weight + channel * 4 + 3).to(tl.float32)
    for age in tl.static_range(1, 4):
        if age <= R:
            x = tl.load(qkv + (R - age) * s_qkv + channel)
        else:
            x = tl.load(ring + channel * RING + (position + R + RING - age) % RING)
        acc += x.to(tl.float32) * tl.load(conv_weight + channel * 4 + 3 - age).to(tl.float32)
    return _silu(acc)


@triton.jit
def _verify_head(
    qkv, z, b, a, ring, conv_weight, A_log, dt_bias, norm_weight, state, slots, positions,
    accepted, kept, kept_gates, out, scale, s_qkv, s_z, s_b, s_a, s_part, eps,
    HK: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BV: tl.constexpr, R: tl.constexpr,
    RING: tl.constexpr, PARTS: tl.constexpr, QUANTISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Replay the accepted rows of the step before, store that state, then run R new rows on it.

    The state passes in tiles of BV columns, so that a thread holds little of it at a time.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    h = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    HV: tl.constexpr = HK * RATIO
    C: tl.constexpr = (2 * HK + HV) * D
    TILES: tl.constexpr = D // BV
    hk = h // RATIO
    d = tl.arange(0, D)
    e = tl.arange(0, BV)
    slot = tl.load(slots + n).to(tl.int64)
    position = tl.load(positions + n)
    again = tl.load(accepted + n)
    row0 = n * R
    state += (slot * HV + h) * (D * D)
    ring += slot * (C * RING)
    kept += (slot * HV + h) * (R * 2 * D)
    kept_gates += (slot * HV + h) * (R * 2)
    qkv += row0 * s_qkv
    cq = hk * D + d
    ck = HK * D + cq
    cv = 2 * HK * D + h * D
    rate = tl.exp(tl.load(A_log + h).to(tl.float32))
    shift = tl.load(dt_bias + h).to(tl.float32)
    queries = ()
    keys = ()
    decays = ()
    betas = ()
    overlaps = ()
    for r in tl.static_range(R):
        q = _conv(qkv, ring, conv_weight, cq, position, s_qkv, r, RING)
        k = _conv(qkv, ring, conv_weight, ck, position, s_qkv, r, RING)
        q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * (D**-0.5)
        k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
        open_ = tl.load(b + (row0 + r) * s_b + h).to(tl.float32)
        dt = tl.load(a + (row0 + r) * s_a + h).to(tl.float32)
        for p in tl.static_range(1, PARTS):
            open_ += tl.load(b + p * s_part + (row0 + r) * s_b + h)
            dt += tl.load(a + p * s_part + (row0 + r) * s_a + h)
        dt += shift
        soft = tl.where(dt > 20.0, dt, tl.log(1.0 + tl.exp(tl.minimum(dt, 20.0))))
        queries = queries + (q,)  # noqa: RUF005
        keys = keys + (k,)  # noqa: RUF005
        decays = decays + (tl.exp(-rate * soft),)  # noqa: RUF005
        betas = betas + (tl.sigmoid(open_),)  # noqa: RUF005
        overlaps = overlaps + (tl.sum(q * k, 0),)  # noqa: RUF005
    outs = ()
    squares = ()
    for tile in tl.static_range(TILES):
        where = state + d[:, None] * D + tile * BV + e[None, :]
        S = tl.load(where).to(tl.float32)
        for r in tl.static_range(R):
            k = tl.load(kept + r * 2 * D + d)
            v = tl.load(kept + (r * 2 + 1) * D + tile * BV + e)
            decay = tl.where(r < again, tl.load(kept_gates + r * 2), 1.0)
            beta = tl.where(r < again, tl.load(kept_gates + r * 2 + 1), 0.0)
            delta = beta * (v - tl.sum(S * k[:, None], 0) * decay)
            S = S * decay + k[:, None] * delta[None, :]
        tl.store(where, S.to(state.dtype.element_ty))
        tl.debug_barrier()  # every thread has read what is kept of this tile: it may be replaced
        for r in tl.static_range(R):
            v = _conv(qkv, ring, conv_weight, cv + tile * BV + e, position, s_qkv, r, RING)
            tl.store(kept + (r * 2 + 1) * D + tile * BV + e, v)
            k = keys[r]
            delta = betas[r] * (v - tl.sum(S * k[:, None], 0) * decays[r])
            o = tl.sum(S * queries[r][:, None], 0) * decays[r] + overlaps[r] * delta
            if r < R - 1:
                S = S * decays[r] + k[:, None] * delta[None, :]
            outs = outs + (o,)  # noqa: RUF005
            squares = squares + (tl.sum(o * o, 0),)  # noqa: RUF005
    tl.debug_barrier()
    for r in tl.static_range(R):
        tl.store(kept + r * 2 * D + d, keys[r])
        tl.store(kept_gates + r * 2, decays[r])
        tl.store(kept_gates + r * 2 + 1, betas[r])
        total = squares[r]
        for tile in tl.static_range(1, TILES):
            total += squares[tile * R + r]
        rstd = tl.rsqrt(total / D + eps)
        at = (row0 + r) * HV + h
        largest = 0.0
        gated = ()
        for tile in tl.static_range(TILES):
            w = tl.load(norm_weight + tile * BV + e).to(tl.float32)
            gate = tl.load(z + (row0 + r) * s_z + h * D + tile * BV + e).to(tl.float32)
            o = outs[tile * R + r] * rstd * w * _silu(gate)
            gated = gated + (o,)  # noqa: RUF005
            largest = tl.maximum(largest, tl.max(tl.abs(o), 0))
        group = tl.maximum(largest, 1e-12) / 448.0
        for tile in tl.static_range(TILES):
            to = out + at * D + tile * BV + e
            if QUANTISE:
                tl.store(to, (gated[tile] / group).to(tl.float8e4nv))
            else:
                tl.store(to, gated[tile].to(out.dtype.element_ty))
        if QUANTISE:
            tl.store(scale + at, group)
    writes = (d * 0 + h) % RATIO == 0
    for r in tl.static_range(R):
        column = (position + r) % RING
        for_q = tl.load(qkv + r * s_qkv + cq).to(ring.dtype.element_ty)
        for_k = tl.load(qkv + r * s_qkv + ck).to(ring.dtype.element_ty)
        for_v = tl.load(qkv + r * s_qkv + cv + d).to(ring.dtype.element_ty)
        tl.store(ring + cq * RING + column, for_q, mask=writes)
        tl.store(ring + ck * RING + column, for_k, mask=writes)
        tl.store(ring + (cv + d) * RING + column, for_v)


def verify_buffers(slots: int, heads: int, dim: int, rows: int, device) -> tuple[Tensor, Tensor]:
    """What ``fused_verify_ring`` keeps of a step: k and v, and decay and beta of its rows."""
    shape = (slots, heads, rows, 2)
    return torch.zeros(*shape, dim, device=device), torch.zeros(*shape, device=device)


def fused_verify_ring(
    mixed_qkv: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    conv_ring: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    recurrent_state: Tensor,
    slot_ids: Tensor,
    positions: Tensor,
    accepted: Tensor,
    kept: tuple[Tensor, Tensor],
    eps: float,
    *,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    tile: int = 64,
    warps: int = 4,
    pdl: bool = False,
) -> Tensor:
    """R rows of each sequence of which later only the first ones may turn out to be accepted.

    The state is read once and written once: what is written is the state after the accepted rows
    of the step before, replayed from ``kept``; the new rows are kept for the next step in turn.
    The ring needs no replay: a column is overwritten when its position comes again.

    Args:
        mixed_qkv, z, b, a, conv_weight, A_log, dt_bias, norm_weight, recurrent_state, slot_ids,
            eps, out, scale, warps, pdl: as in ``fused_decode_ring`` with N*R rows; dk = dv.
        conv_ring: (slots, C, ring) with ring >= R + 3; position p is in column p % ring.
        positions: (N,) int32 position of each sequence's first new row.
        accepted: (N,) int32 how many rows of the step before count (0 for none before).
        kept: from ``verify_buffers``.
        tile: columns of the state that pass at a time.
    """
    heads, d = recurrent_state.shape[1:3]
    key_heads = (conv_weight.shape[0] - heads * d) // (2 * d)
    n, ring = len(slot_ids), conv_ring.shape[-1]
    rows = len(z) // n
    if mixed_qkv.ndim != 2 or z.ndim != 2:
        raise KernelError(
            f"projections in parts, {tuple(mixed_qkv.shape)}",
            hint="only the gates b and a may come in parts here: take split=1 for q, k, v and z",
        )
    if ring < rows + 3:
        raise KernelError(
            f"a ring of {ring} columns for {rows} new rows",
            hint="the convolution's ring needs the new rows and the three before them",
        )
    out = mixed_qkv.new_empty(len(z), heads * d) if out is None else out
    _verify_head[(heads, n)](
        mixed_qkv, z, b, a, conv_ring, conv_weight, A_log, dt_bias, norm_weight, recurrent_state,
        slot_ids, positions, accepted, *kept, out, out if scale is None else scale,
        mixed_qkv.stride(0), z.stride(0), b.stride(-2), a.stride(-2), b.stride(0), eps,
        HK=key_heads, RATIO=heads // key_heads, D=d, BV=min(tile, d), R=rows, RING=ring,
        PARTS=b.shape[0] if b.ndim == 3 else 1, QUANTISE=scale is not None, PDL=pdl,
        num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    return out
