"""Gated delta rule token by token in Triton: a few tokens per sequence, and the fused decode step.

Both stream the state: it is read once and written once, everything else is small.
``fused_decode`` is one launch from the projections to the gated norm: convolution update, SiLU,
L2 norm, gates, delta rule, gated RMSNorm. A program owns one key head of one sequence with its
value heads, because their programs would race on the shared columns of the convolution state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qnext.errors import KernelError

TAPS = 4
#: (value columns per program, warps) of the token loop.
RECURRENT_CONFIG = (32, 4)
#: (value columns per tile, warps, tiles loaded ahead) of the fused decode.
DECODE_CONFIG = (64, 2, 1)


@triton.jit
def _recurrent(
    q, k, v, g, beta, o, source, target, states, slots, cu_seqlens, sq, sk, sv,
    RATIO: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    START: tl.constexpr, SLOTS: tl.constexpr, UPDATE: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """One sequence, value head and tile of BV value columns, token after token."""
    tile = tl.program_id(0)
    h = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    bos = tl.load(cu_seqlens + n).to(tl.int64)
    length = (tl.load(cu_seqlens + n + 1) - bos).to(tl.int32)
    slot = n
    if SLOTS:
        slot = tl.load(slots + n).to(tl.int64)
        if slot < 0:
            length = 0
    d = tl.arange(0, DK)
    e = tile * BV + tl.arange(0, BV)
    inside = h * DK * DV + d[:, None] * DV + e[None, :]
    S = tl.zeros((DK, BV), tl.float32)
    if START:
        S = tl.load(source + tl.maximum(slot, 0) * (HV * DK * DV) + inside).to(tl.float32)
    hk = h // RATIO
    for step in range(length):
        t = bos + step
        kt = tl.load(k + t * sk + hk * DK + d).to(tl.float32)
        qt = tl.load(q + t * sq + hk * DK + d).to(tl.float32)
        vt = tl.load(v + t * sv + h * DV + e).to(tl.float32)
        decay = tl.exp(tl.load(g + t * HV + h).to(tl.float32))
        S = S * decay
        delta = (vt - tl.sum(S * kt[:, None], 0)) * tl.load(beta + t * HV + h).to(tl.float32)
        S = S + kt[:, None] * delta[None, :]
        out = tl.sum(S * qt[:, None], 0)
        tl.store(o + (t * HV + h) * DV + e, out.to(o.dtype.element_ty))
        if STATES:
            tl.store(states + t * (HV * DK * DV) + inside, S.to(states.dtype.element_ty))
    if UPDATE:
        keep = (d[:, None] * 0 + slot) >= 0
        where = target + tl.maximum(slot, 0) * (HV * DK * DV) + inside
        tl.store(where, S.to(target.dtype.element_ty), mask=keep)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    source: Tensor | None,
    target: Tensor | None,
    slots: Tensor | None,
    states: Tensor | None,
) -> Tensor:
    key_heads, dk = k.shape[1:]
    heads, dv = v.shape[1:]
    q, k, v = (x if x[0].is_contiguous() else x.contiguous() for x in (q, k, v))
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    width, warps = RECURRENT_CONFIG
    width = min(width, dv)
    unused = cu_seqlens
    _recurrent[(dv // width, heads, len(cu_seqlens) - 1)](
        q, k, v, g.contiguous(), beta.contiguous(), o,
        unused if source is None else source, unused if target is None else target,
        unused if states is None else states, unused if slots is None else slots, cu_seqlens,
        q.stride(0), k.stride(0), v.stride(0), RATIO=heads // key_heads, HV=heads, DK=dk, DV=dv,
        BV=width, START=source is not None, SLOTS=slots is not None, UPDATE=target is not None,
        STATES=states is not None, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return o


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    return_states: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """The contract of ``qnext.kernels.gated_delta``; no gradients."""
    shape = (v.shape[1], k.shape[2], v.shape[2])
    final = torch.empty(len(cu_seqlens) - 1, *shape, dtype=torch.float32, device=v.device)
    initial = None if initial_state is None else initial_state.contiguous()
    if not return_states:
        return _run(q, k, v, g, beta, cu_seqlens, initial, final, None, None), final
    states = torch.empty(len(v), *shape, dtype=torch.float32, device=v.device)
    return _run(q, k, v, g, beta, cu_seqlens, initial, final, None, states), final, states


def recurrent_gated_delta_rule_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    recurrent_state: Tensor,
    slot_ids: Tensor,
    *,
    states: Tensor | None = None,
    update: bool = True,
) -> Tensor:
    """The same from and to slots of a cache, in place.

    Args:
        q: (T, Hk, dk), as the other arguments up to ``cu_seqlens`` those of
            :func:`recurrent_gated_delta_rule`.
        k: (T, Hk, dk).
        v: (T, Hv, dv).
        g: (T, Hv).
        beta: (T, Hv).
        cu_seqlens: (N + 1,) int32.
        recurrent_state: (slots, Hv, dk, dv) fp32 or bf16, contiguous.
        slot_ids: (N,) int32 slot of each sequence; a negative one skips the sequence.
        states: (T, Hv, dk, dv) that receives the state after every token, or None.
        update: whether the slots are written (False when drafts are only verified).

    Returns:
        (T, Hv, dv) in the dtype of v.
    """
    target = recurrent_state if update else None
    return _run(q, k, v, g, beta, cu_seqlens, recurrent_state, target, slot_ids, states)


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _decode(
    qkv, z, b, a, conv_state, conv_weight, A_log, dt_bias, norm_weight, state, slots, out,
    s_qkv, s_z, s_b, s_a, eps,
    HK: tl.constexpr, RATIO: tl.constexpr, HEADS: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token of one sequence: one key head and the RATIO value heads that share it.

    The state passes in tiles of BV columns with loads ahead; HEADS is RATIO's next power of two.
    """
    hk = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    HV: tl.constexpr = HK * RATIO
    C: tl.constexpr = 2 * HK * DK + HV * DV
    TILES: tl.constexpr = DV // BV
    d = tl.arange(0, DK)
    e = tl.arange(0, BV)
    part = tl.arange(0, HEADS * TILES)
    own = (part < RATIO * TILES)[:, None]
    column = (n * HV + hk * RATIO) * DV + part[:, None] * BV + e[None, :]
    if PDL:
        gdc_launch_dependents()
    slot = tl.load(slots + n).to(tl.int64)
    if slot < 0:
        if PDL:
            gdc_wait()
        tl.store(out + column, tl.zeros((HEADS * TILES, BV), out.dtype.element_ty), mask=own)
        return
    state += slot * (HV * DK * DV) + hk * RATIO * DK * DV
    conv_state += slot * (C * 3)
    if PDL:
        gdc_wait()

    cq = hk * DK + d
    ck = HK * DK + cq
    q0 = tl.load(conv_state + cq * 3)
    q1 = tl.load(conv_state + cq * 3 + 1)
    q2 = tl.load(conv_state + cq * 3 + 2)
    k0 = tl.load(conv_state + ck * 3)
    k1 = tl.load(conv_state + ck * 3 + 1)
    k2 = tl.load(conv_state + ck * 3 + 2)
    q3 = tl.load(qkv + n * s_qkv + cq)
    k3 = tl.load(qkv + n * s_qkv + ck)
    q = q0.to(tl.float32) * tl.load(conv_weight + cq * 4).to(tl.float32)
    q += q1.to(tl.float32) * tl.load(conv_weight + cq * 4 + 1).to(tl.float32)
    q += q2.to(tl.float32) * tl.load(conv_weight + cq * 4 + 2).to(tl.float32)
    q += q3.to(tl.float32) * tl.load(conv_weight + cq * 4 + 3).to(tl.float32)
    k = k0.to(tl.float32) * tl.load(conv_weight + ck * 4).to(tl.float32)
    k += k1.to(tl.float32) * tl.load(conv_weight + ck * 4 + 1).to(tl.float32)
    k += k2.to(tl.float32) * tl.load(conv_weight + ck * 4 + 2).to(tl.float32)
    k += k3.to(tl.float32) * tl.load(conv_weight + ck * 4 + 3).to(tl.float32)
    q = _silu(q)
    k = _silu(k)
    q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * (DK**-0.5)
    k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    qk = tl.sum(q * k, 0)
    # threads hold copies of these columns: all must have read before one writes
    tl.debug_barrier()
    tl.store(conv_state + cq * 3, q1)
    tl.store(conv_state + cq * 3 + 1, q2)
    tl.store(conv_state + cq * 3 + 2, q3.to(q2.dtype))
    tl.store(conv_state + ck * 3, k1)
    tl.store(conv_state + ck * 3 + 1, k2)
    tl.store(conv_state + ck * 3 + 2, k3.to(k2.dtype))

    normed = tl.zeros((HEADS * TILES, BV), tl.float32)
    for p in tl.range(0, RATIO * TILES, num_stages=STAGES):
        h = hk * RATIO + p // TILES
        where = state + (p // TILES) * (DK * DV) + p % TILES * BV + d[:, None] * DV + e[None, :]
        S = tl.load(where).to(tl.float32)
        cv = 2 * HK * DK + (hk * RATIO * TILES + p) * BV + e
        v0 = tl.load(conv_state + cv * 3)
        v1 = tl.load(conv_state + cv * 3 + 1)
        v2 = tl.load(conv_state + cv * 3 + 2)
        v3 = tl.load(qkv + n * s_qkv + cv)
        v = v0.to(tl.float32) * tl.load(conv_weight + cv * 4).to(tl.float32)
        v += v1.to(tl.float32) * tl.load(conv_weight + cv * 4 + 1).to(tl.float32)
        v += v2.to(tl.float32) * tl.load(conv_weight + cv * 4 + 2).to(tl.float32)
        v += v3.to(tl.float32) * tl.load(conv_weight + cv * 4 + 3).to(tl.float32)
        v = _silu(v)
        beta = tl.sigmoid(tl.load(b + n * s_b + h).to(tl.float32))
        dt = tl.load(a + n * s_a + h).to(tl.float32) + tl.load(dt_bias + h).to(tl.float32)
        soft = tl.where(dt > 20.0, dt, tl.log(1.0 + tl.exp(tl.minimum(dt, 20.0))))
        decay = tl.exp(-tl.exp(tl.load(A_log + h).to(tl.float32)) * soft)
        predicted = tl.sum(S * k[:, None], 0) * decay
        read = tl.sum(S * q[:, None], 0) * decay
        delta = beta * (v - predicted)
        S = S * decay + k[:, None] * delta[None, :]
        tl.store(where, S.to(state.dtype.element_ty))
        normed = tl.where(part[:, None] == p, (read + qk * delta)[None, :], normed)

    # not in the loop: a barrier there would keep its loads from running ahead
    cv = 2 * HK * DK + (hk * RATIO * TILES + part[:, None]) * BV + e[None, :]
    v1 = tl.load(conv_state + cv * 3 + 1, mask=own)
    v2 = tl.load(conv_state + cv * 3 + 2, mask=own)
    v3 = tl.load(qkv + n * s_qkv + cv, mask=own)
    tl.debug_barrier()
    tl.store(conv_state + cv * 3, v1, mask=own)
    tl.store(conv_state + cv * 3 + 1, v2, mask=own)
    tl.store(conv_state + cv * 3 + 2, v3.to(v2.dtype), mask=own)

    square = tl.reshape(tl.sum(normed * normed, 1), (HEADS, TILES))
    rstd = tl.rsqrt(tl.sum(square, 1) / DV + eps)[:, None] + tl.zeros((HEADS, TILES), tl.float32)
    normed *= tl.reshape(rstd, (HEADS * TILES,))[:, None]
    w = tl.load(norm_weight + (part % TILES)[:, None] * BV + e[None, :]).to(tl.float32)
    gate = z + n * s_z + hk * RATIO * DV + part[:, None] * BV + e[None, :]
    normed *= w * _silu(tl.load(gate, mask=own, other=0.0).to(tl.float32))
    tl.store(out + column, normed.to(out.dtype.element_ty), mask=own)


def fused_decode(
    mixed_qkv: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    recurrent_state: Tensor,
    slot_ids: Tensor,
    eps: float,
    *,
    pdl: bool = False,
) -> Tensor:
    """One token per sequence, from the projections to the input of ``out_proj``, in one launch.

    Both states are updated in place. The interior is fp32 throughout (spec 4.2 to 4.6).

    Args:
        mixed_qkv: (N, C) q | k | v of the projection, C = 2 Hk dk + Hv dv; rows may be strided,
            as those of ``z``, ``b`` and ``a``.
        z: (N, Hv * dv) output gate.
        b: (N, Hv) before the sigmoid.
        a: (N, Hv) before the softplus.
        conv_state: (slots, C, 3) last inputs of the convolution, contiguous.
        conv_weight: (C, 4).
        A_log: (Hv,).
        dt_bias: (Hv,).
        norm_weight: (dv,) plain weight of the gated norm.
        recurrent_state: (slots, Hv, dk, dv) fp32 or bf16, contiguous.
        slot_ids: (N,) int32; distinct. A negative one gives zeros and touches no state.
        eps: of the gated norm.
        pdl: start while the kernel before still runs (programmatic dependent launch).

    Returns:
        (N, Hv * dv) in the dtype of ``mixed_qkv``.

    Raises:
        KernelError: another number of taps than 4, or states that are not contiguous.
    """
    heads, dk, dv = recurrent_state.shape[1:]
    channels, taps = conv_weight.shape
    key_heads = (channels - heads * dv) // (2 * dk)
    if taps != TAPS or not (conv_state.is_contiguous() and recurrent_state.is_contiguous()):
        raise KernelError(
            f"fused decode: {taps} taps, states of strides {conv_state.stride()} and "
            f"{recurrent_state.stride()}",
            hint="the fused kernel has 4 taps and contiguous states; use the separate ops",
        )
    out = torch.empty(len(z), heads * dv, dtype=mixed_qkv.dtype, device=z.device)
    width, warps, stages = DECODE_CONFIG
    ratio = heads // key_heads
    options = {"launch_pdl": True} if pdl else {}
    _decode[(key_heads, len(z))](
        mixed_qkv, z, b, a, conv_state, conv_weight, A_log, dt_bias, norm_weight, recurrent_state,
        slot_ids, out, mixed_qkv.stride(0), z.stride(0), b.stride(0), a.stride(0), eps,
        HK=key_heads, RATIO=ratio, HEADS=triton.next_power_of_2(ratio), DK=dk, DV=dv,
        BV=min(width, dv), STAGES=stages, PDL=pdl, num_warps=warps, num_stages=stages, **options,
    )  # fmt: skip
    return out
