"""Triton: add what the half layer before left, normalise, quantise; one program per token.

The seam between two half layers of a captured step. The sums that the kernels before left in
parts (slices of K of the output projection; a token's experts) are added to the residual stream in
a fixed order, and the next projections get their input twice: BF16, and e4m3 with one fp32 scale
for every 128 channels, the form in which FP8 checkpoints expect activations.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

GROUP = 128
"""Channels that share one scale."""


@triton.jit
def quantise(value, axis: tl.constexpr):
    """e4m3 numbers and their scales along ``axis`` (the group)."""
    scale = tl.maximum(tl.max(tl.abs(value), axis=axis), 1e-12) / 448.0
    return (value / tl.expand_dims(scale, axis)).to(tl.float8e4nv), scale


@triton.jit
def _add_norm_quantise(
    h, parts, extra, weight, normed, q, scale, zero, token_stride, part_stride, eps,
    P: tl.constexpr, EXTRA: tl.constexpr, GROUPS: tl.constexpr, ZEROS: tl.constexpr,
    B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    H: tl.constexpr = GROUPS * 128
    t = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, B)[:, None]
    at = group * 128 + tl.arange(0, 128)[None, :]
    live = (group < GROUPS) & (at >= 0)
    w = 1.0 + tl.load(weight + at, mask=live, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(h + t * H + at, mask=live, other=0.0).to(tl.float32)
    if P > 0:
        total = tl.zeros([B, 128], tl.float32)
        for p in tl.static_range(P):
            total += tl.load(parts + t * token_stride + p * part_stride + at, mask=live, other=0.0)
        if EXTRA:
            total += tl.load(extra + t * H + at, mask=live, other=0.0)
        rounded = (x + total).to(h.dtype.element_ty)
        tl.store(h + t * H + at, rounded, mask=live)
        x = rounded.to(tl.float32)
    x *= tl.rsqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / H + eps) * w
    tl.store(normed + t * H + at, x.to(normed.dtype.element_ty), mask=live)
    small, s = quantise(x, 1)
    tl.store(q + t * H + at, small, mask=live)
    groups = tl.arange(0, B)
    tl.store(scale + t * GROUPS + groups, s, mask=groups < GROUPS)
    if ZEROS > 0:  # noqa: SIM102 - one is known when compiling
        if t == 0:
            i = tl.arange(0, ZEROS)
            tl.store(zero + i, tl.zeros([ZEROS], tl.int32))


def add_norm_quantise(
    hidden: Tensor,
    weight: Tensor,
    normed: Tensor,
    quantised: Tensor,
    scale: Tensor,
    *,
    parts: Tensor | None = None,
    extra: Tensor | None = None,
    zero: Tensor | None = None,
    eps: float = 1e-6,
    pdl: bool = False,
) -> None:
    """``hidden += sum(parts) + extra``; zero-centred RMSNorm of it in BF16 and in e4m3.

    Args:
        hidden: (T, H) residual stream, updated in place; H a multiple of 128.
        weight: (H,) zero-centred norm weight.
        normed: (T, H) output in its dtype.
        quantised: (T, H) e4m3 output.
        scale: (T, H / 128) fp32 output.
        parts: (T, P, H) view of fp32 terms, last axis contiguous.
        extra: (T, H) fp32, one more term (the shared expert).
        zero: int32 counters to clear for the kernels that follow, a power of two of them.
        eps: of the norm.
        pdl: launch with programmatic stream serialization.
    """
    t, h = hidden.shape
    p = 0 if parts is None else parts.shape[1]
    _add_norm_quantise[(t,)](
        hidden, hidden if parts is None else parts, hidden if extra is None else extra, weight,
        normed, quantised, scale, scale if zero is None else zero,
        0 if parts is None else parts.stride(0), 0 if parts is None else parts.stride(1), eps,
        P=p, EXTRA=extra is not None, GROUPS=h // GROUP, ZEROS=0 if zero is None else len(zero),
        B=triton.next_power_of_2(h // GROUP), PDL=pdl, num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
