"""Fused DeltaNet decode for small batches: one program per value head, loads before anything else.

``triton_recurrent.fused_decode`` has a program per key head and shifts the convolution's window;
at one sequence that is 16 programs whose loads wait for one another (15.9 us). Here the window is
a ring indexed by the position: programs that share a column only ever write the one that none of
them reads, so no order among them is needed, and every load is issued before the first store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qnext.kernels.linear.triton import prefetch_l2
from qnext.kernels.norm.triton_quantise import quantise


@triton.jit
def _past(ring, conv_weight, channel, position):
    """The share of the three tokens before in the convolution of each channel."""
    acc = tl.zeros(channel.shape, tl.float32)
    for age in tl.static_range(1, 4):
        x = tl.load(ring + channel * 4 + (position + 4 - age) % 4).to(tl.float32)
        acc += x * tl.load(conv_weight + channel * 4 + 3 - age).to(tl.float32)
    return acc


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _decode_head(
    qkv, z, b, a, ring, conv_weight, A_log, dt_bias, norm_weight, state, slots, positions, out,
    scale, s_qkv, s_z, s_b, s_a, s_part, s_wide, eps,
    HK: tl.constexpr, RATIO: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr, QUANTISE: tl.constexpr, FETCH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    h = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    HV: tl.constexpr = HK * RATIO
    C: tl.constexpr = 2 * HK * DK + HV * DV
    hk = h // RATIO
    d = tl.arange(0, DK)
    e = tl.arange(0, DV)
    slot = tl.load(slots + n).to(tl.int64)
    position = tl.load(positions + n)
    if slot < 0:
        if PDL:
            gdc_wait()
        tl.store(out + (n * HV + h) * DV + e, tl.zeros([DV], tl.float32).to(out.dtype.element_ty))
        if QUANTISE:
            tl.store(scale + n * HV + h, 1.0)
        return
    state += (slot * HV + h) * (DK * DV)
    ring += slot * (C * 4)
    if PDL and FETCH:
        # last written a step ago: more programs lie between than the GPU can hold
        size: tl.constexpr = DK * DV * state.dtype.element_ty.primitive_bitwidth // 8
        prefetch_l2(state, size)
    cq = hk * DK + d
    ck = HK * DK + cq
    cv = 2 * HK * DK + h * DV + e
    q = _past(ring, conv_weight, cq, position)
    k = _past(ring, conv_weight, ck, position)
    v = _past(ring, conv_weight, cv, position)
    wq = tl.load(conv_weight + cq * 4 + 3).to(tl.float32)
    wk = tl.load(conv_weight + ck * 4 + 3).to(tl.float32)
    wv = tl.load(conv_weight + cv * 4 + 3).to(tl.float32)
    w = tl.load(norm_weight + e).to(tl.float32)
    rate = tl.exp(tl.load(A_log + h).to(tl.float32))
    shift = tl.load(dt_bias + h).to(tl.float32)
    if PDL:
        gdc_wait()
    nq = tl.load(qkv + n * s_qkv + cq)
    nk = tl.load(qkv + n * s_qkv + ck)
    nv = tl.load(qkv + n * s_qkv + cv)
    gate = tl.load(z + n * s_z + h * DV + e).to(tl.float32)
    for p in tl.static_range(1, WIDE):
        nq += tl.load(qkv + p * s_wide + n * s_qkv + cq)
        nk += tl.load(qkv + p * s_wide + n * s_qkv + ck)
        nv += tl.load(qkv + p * s_wide + n * s_qkv + cv)
        gate += tl.load(z + p * s_wide + n * s_z + h * DV + e)
    open_ = tl.load(b + n * s_b + h).to(tl.float32)
    dt = tl.load(a + n * s_a + h).to(tl.float32)
    for p in tl.static_range(1, PARTS):
        open_ += tl.load(b + p * s_part + n * s_b + h)
        dt += tl.load(a + p * s_part + n * s_a + h)
    beta = tl.sigmoid(open_)
    dt += shift
    # loaded last: Triton gives the products the layout of the last load
    where = state + d[:, None] * DV + e[None, :]
    S = tl.load(where).to(tl.float32)

    q = _silu(q + nq.to(tl.float32) * wq)
    k = _silu(k + nk.to(tl.float32) * wk)
    v = _silu(v + nv.to(tl.float32) * wv)
    q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * (DK**-0.5)
    k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    soft = tl.where(dt > 20.0, dt, tl.log(1.0 + tl.exp(tl.minimum(dt, 20.0))))
    decay = tl.exp(-rate * soft)
    # both products read the old state, so that neither waits for the other
    predicted = tl.sum(S * k[:, None], 0) * decay
    read = tl.sum(S * q[:, None], 0) * decay
    delta = beta * (v - predicted)
    o = read + tl.sum(q * k, 0) * delta
    S = S * decay + k[:, None] * delta[None, :]
    o *= tl.rsqrt(tl.sum(o * o, 0) / DV + eps) * w * _silu(gate)
    if QUANTISE:  # a head is one group
        o, group = quantise(o, 0)
        tl.store(scale + n * HV + h, group)
        tl.store(out + (n * HV + h) * DV + e, o)
    else:
        tl.store(out + (n * HV + h) * DV + e, o.to(out.dtype.element_ty))
    tl.store(where, S.to(state.dtype.element_ty))
    column = position % 4
    writes = (d * 0 + h) % RATIO == 0
    tl.store(ring + cq * 4 + column, nq.to(ring.dtype.element_ty), mask=writes)
    tl.store(ring + ck * 4 + column, nk.to(ring.dtype.element_ty), mask=writes)
    tl.store(ring + cv * 4 + column, nv.to(ring.dtype.element_ty))


def ring_of(conv_state: Tensor, positions: Tensor) -> Tensor:
    """(N, C, 3) last inputs, oldest first, as the ring (N, C, 4) before ``positions`` (N,)."""
    ring = conv_state.new_zeros(*conv_state.shape[:2], 4)
    column = (positions.long()[:, None] + torch.arange(1, 4, device=positions.device)) % 4
    return ring.scatter_(2, column[:, None].expand_as(conv_state), conv_state)


def fused_decode_ring(
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
    eps: float,
    *,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    warps: int = 4,
    pdl: bool = False,
) -> Tensor:
    """``triton_recurrent.fused_decode`` with the window of the convolution in a ring.

    Args:
        mixed_qkv, z: projections, (N, C), (N, Hv * dv), rows strided; or (P, N, ..) fp32 terms
            to add up.
        b, a: (N, Hv), rows strided; or (P, N, Hv) fp32 terms.
        conv_ring: (slots, C, 4) last inputs of the convolution; that of position p is in column
            p % 4 (``ring_of``).
        conv_weight, A_log, dt_bias, norm_weight: as there.
        recurrent_state: (slots, Hv, dk, dv) fp32 or bf16, contiguous.
        slot_ids: (N,) int32; distinct; a negative one gives zeros and touches no state.
        positions: (N,) int32 positions of the new tokens. Like the slots they are read before
            the kernel before has finished: a captured step may change them only at its end.
        eps: of the gated norm.
        out: (N, Hv * dv), else new.
        scale: (N, Hv) fp32; with it ``out`` is e4m3, quantised by heads of 128 channels.
        warps: launch choice; with more threads than columns Triton would load each column in
            every thread that uses it.
        pdl: launch with programmatic stream serialization.
    """
    heads, dk, dv = recurrent_state.shape[1:]
    key_heads = (conv_weight.shape[0] - heads * dv) // (2 * dk)
    n = z.shape[-2]
    if out is None:
        out = mixed_qkv.new_empty(n, heads * dv)
    # more than fits into L2 would push out what it fetched before it is read
    fetch = n * recurrent_state[0].numel() * recurrent_state.element_size() <= 20 << 20
    _decode_head[(heads, n)](
        mixed_qkv, z, b, a, conv_ring, conv_weight, A_log, dt_bias, norm_weight, recurrent_state,
        slot_ids, positions, out, out if scale is None else scale, mixed_qkv.stride(-2),
        z.stride(-2), b.stride(-2), a.stride(-2), b.stride(0), mixed_qkv.stride(0), eps,
        HK=key_heads, RATIO=heads // key_heads, DK=dk, DV=dv,
        PARTS=b.shape[0] if b.ndim == 3 else 1, WIDE=z.shape[0] if z.ndim == 3 else 1,
        QUANTISE=scale is not None, FETCH=fetch, PDL=pdl, num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    return out
