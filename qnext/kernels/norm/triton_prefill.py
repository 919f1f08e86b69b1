"""Norms that end in FP8, in Triton: the row is read once, its quantised form leaves with it.

``norm_quantised``: residual add, zero-centred RMSNorm, BF16 row (for the small BF16 matrices) and
FP8 row with scales (for the large ones). ``gated_norm_quantised``: DeltaNet's gated norm. Scales
are those of ``qnext.kernels.linear.quantised``, stored (groups, rows).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8 = torch.float8_e4m3fn


@triton.jit
def fp8_groups(y):
    """Rows of (..., 128) fp32 -> (e4m3 numbers, their scale): largest magnitude over 448."""
    scale = tl.maximum(tl.max(tl.abs(y), 2), 1e-10) / 448.0
    return (y * (1.0 / scale)[:, :, None]).to(tl.float8e4nv), scale


@triton.jit
def store_fp8(y, quantised, scales, at, first, rows, r, live, D: tl.constexpr, BR: tl.constexpr):
    """Store fp32 ``y`` [BR, D] as FP8 at ``at``, its scales as groups ``first`` and following.

    ``r`` is [BR, 1]. One group a row stays two-dimensional: turning the tile costs a trip
    through shared memory.
    """
    if D == 128:
        scale = tl.maximum(tl.max(tl.abs(y), 1), 1e-10)[:, None] / 448.0
        tl.store(quantised + at, (y * (1.0 / scale)).to(tl.float8e4nv), mask=live)
        tl.store(scales + first * rows + r, scale, mask=live)
    else:
        small, scale = fp8_groups(tl.reshape(y, [BR, D // 128, 128]))
        tl.store(quantised + at, tl.reshape(small, [BR, D]), mask=live)
        g = tl.arange(0, D // 128)[None, :]
        tl.store(scales + (first + g) * rows + r, scale, mask=live)


@triton.jit
def norm_row(xt, weight, normed, quantised, scales, r, d, live, rows, eps,
             D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    """Zero-centred norm of fp32 rows ``xt`` [BR, BD]; stores BF16 and FP8 rows and scales."""
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(xt * xt, 1) / D + eps)[:, None]
    y = (xt * rstd * (1.0 + w)).to(normed.dtype.element_ty)
    if KEEP:
        tl.store(normed + r * D + d, y, mask=live)
    groups = tl.reshape(y.to(tl.float32), [BR, BD // 128, 128])
    small, scale = fp8_groups(groups)
    tl.store(quantised + r * D + d, tl.reshape(small, [BR, BD]), mask=live)
    g = tl.arange(0, BD // 128)[None, :]
    tl.store(scales + g.to(tl.int64) * rows + r, scale, mask=(r < rows) & (g < D // 128))


@triton.jit
def _norm(
    x, residual, weight, total, normed, quantised, scales, rows, eps, s_x,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, ADD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    d = tl.arange(0, BD)[None, :]
    live = (r < rows) & (d < D)
    xt = tl.load(x + r * s_x + d, mask=live, other=0.0).to(tl.float32)
    if ADD:
        xt += tl.load(residual + r * D + d, mask=live, other=0.0).to(tl.float32)
        rounded = xt.to(total.dtype.element_ty)
        tl.store(total + r * D + d, rounded, mask=live)
        xt = rounded.to(tl.float32)
    norm_row(xt, weight, normed, quantised, scales, r, d, live, rows, eps, D, BD, BR, KEEP)


@triton.jit
def _gated(
    x, z, weight, quantised, scales, rows, eps, s_z,
    HEADS: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One head of BR tokens: its scales lie side by side."""
    r = tl.program_id(1) * BR + tl.arange(0, BR)[:, None]
    head = tl.program_id(0)
    d = tl.arange(0, D)[None, :]
    live = r < rows
    r = r.to(tl.int64)
    at = (r * HEADS + head) * D + d
    # the weight first: Triton gives a product the layout of the load that comes last
    w = tl.load(weight + d).to(tl.float32)
    xt = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    zt = tl.load(z + r * s_z + head * D + d, mask=live, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(xt * xt, 1) / D + eps)[:, None]
    y = (xt * rstd * w * (zt / (1.0 + tl.exp(-zt)))).to(DTYPE).to(tl.float32)
    store_fp8(y, quantised, scales, at, head * (D // 128), rows, r, live, D, BR)


def norm_quantised(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, keep: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``total = x + residual``; its zero-centred RMSNorm in the dtype of x and in FP8.

    Args:
        x: (T, D), rows may be strided; D is a multiple of 128.
        weight: (D,), stored as the distance from one.
        eps: added to the mean square.
        residual: (T, D) or None.
        keep: also store the normed row unquantised.

    Returns:
        ``(total, normed, quantised, scales)``; total is x without a residual, normed is empty
        without ``keep``; scales are (D / 128, T) fp32.
    """
    rows, width = x.shape
    total = x if residual is None else torch.empty(rows, width, dtype=x.dtype, device=x.device)
    normed = torch.empty(rows if keep else 0, width, dtype=x.dtype, device=x.device)
    quantised = torch.empty(rows, width, dtype=FP8, device=x.device)
    scales = torch.empty(width // 128, rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    each = max(1, 4096 // block)
    _norm[(triton.cdiv(rows, each),)](
        x, x if residual is None else residual, weight, total, normed, quantised, scales, rows,
        eps, x.stride(0), D=width, BD=block, BR=each, ADD=residual is not None, KEEP=keep,
        num_warps=8 if block >= 2048 else 4,
    )  # fmt: skip
    return total, normed, quantised, scales


_TRITON = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


def gated_norm_quantised(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """DeltaNet's output norm, ``rms_norm(x) * weight * silu(z)``, in FP8.

    Args:
        x: (T, heads, D) contiguous; D is a multiple of 128 and a power of two.
        z: (T, heads * D), rows may be strided.
        weight: (D,).
        eps: added to the mean square.

    Returns:
        e4m3 (T, heads * D) and scales (heads * D / 128, T) fp32.
    """
    rows, heads, width = x.shape
    quantised = torch.empty(rows, heads * width, dtype=FP8, device=x.device)
    scales = torch.empty(heads * width // 128, rows, dtype=torch.float32, device=x.device)
    each = max(1, 4096 // width)
    _gated[(heads, triton.cdiv(rows, each))](
        x, z, weight, quantised, scales, rows, eps, z.stride(0), HEADS=heads, D=width, BR=each,
        DTYPE=_TRITON[x.dtype], num_warps=4,
    )  # fmt: skip
    return quantised, scales
