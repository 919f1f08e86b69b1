"""RMS norms in Triton, forward and backward; fp32 inside, one rounding at the end.

One kernel pair serves ``rms_norm`` (1 + w), ``add_rms_norm`` (residual added first) and
``gated_rms_norm`` (plain w, times silu(z)). A program owns a few whole rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Numbers in flight per program, and the most programs of a backward (each keeps one dw).
NUMBERS = 4096
BACKWARD_PROGRAMS = 528


@triton.jit
def _forward(
    x, residual, z, weight, y, total, rows, eps, s_x, s_z,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    ADD: tl.constexpr, GATE: tl.constexpr,
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
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(xt * xt, 1) / D + eps)[:, None]
    if GATE:
        zt = tl.load(z + r * s_z + d, mask=live, other=0.0).to(tl.float32)
        out = xt * rstd * w * zt * tl.sigmoid(zt)
    else:
        out = xt * rstd * (1.0 + w)
    tl.store(y + r * D + d, out.to(y.dtype.element_ty), mask=live)


@triton.jit
def _backward(
    x, z, weight, d_y, d_total, d_x, d_z, d_weight, rows, eps, s_x, s_z,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    ADD: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Dx (and dz) of the rows, and this program's part of dweight."""
    d = tl.arange(0, BD)[None, :]
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    if not GATE:
        w += 1.0
    dw = tl.zeros((BR, BD), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BR), tl.num_programs(0)):
        r = (block * BR + tl.arange(0, BR)[:, None]).to(tl.int64)
        live = (r < rows) & (d < D)
        xt = tl.load(x + r * s_x + d, mask=live, other=0.0).to(tl.float32)
        dy = tl.load(d_y + r * D + d, mask=live, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(xt * xt, 1) / D + eps)[:, None]
        normed = xt * rstd
        if GATE:
            zt = tl.load(z + r * s_z + d, mask=live, other=0.0).to(tl.float32)
            gate = tl.sigmoid(zt)
            dz = dy * normed * w * gate * (1.0 + zt * (1.0 - gate))
            tl.store(d_z + r * D + d, dz.to(d_z.dtype.element_ty), mask=live)
            dy = dy * zt * gate
        dw += dy * normed
        dn = dy * w
        dx = (dn - normed * (tl.sum(dn * normed, 1) / D)[:, None]) * rstd
        if ADD:
            dx += tl.load(d_total + r * D + d, mask=live, other=0.0).to(tl.float32)
        tl.store(d_x + r * D + d, dx.to(d_x.dtype.element_ty), mask=live)
    out = d_weight + tl.program_id(0) * D + d
    tl.store(out, tl.sum(dw, 0)[None, :], mask=d < D)


def _shape(rows: int, width: int) -> tuple[int, int, int]:
    """(padded width, rows per program, warps)."""
    padded = triton.next_power_of_2(width)
    block = max(1, min(NUMBERS // padded, triton.next_power_of_2(rows)))
    return padded, block, min(max(padded * block // 1024, 1), 16)


def _rows(x: Tensor) -> Tensor:
    """(rows, D) without a copy where only the row stride is free."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


class _Norm(torch.autograd.Function):
    """All three norms: ``residual`` and ``z`` are optional, ``z`` also means a plain weight."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        residual: Tensor | None,
        z: Tensor | None,
        weight: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """``(normed, x + residual)``; the second is x itself without a residual."""
        rows, width = x.shape
        padded, block, warps = _shape(rows, width)
        y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
        total = x if residual is None else torch.empty_like(y)
        if rows:
            _forward[(triton.cdiv(rows, block),)](
                x, x if residual is None else residual, x if z is None else z, weight, y, total,
                rows, eps, x.stride(0), 0 if z is None else z.stride(0), D=width, BD=padded,
                BR=block, ADD=residual is not None, GATE=z is not None, num_warps=warps,
            )  # fmt: skip
        ctx.save_for_backward(total, z, weight)  # type: ignore[arg-type]
        ctx.eps, ctx.add = eps, residual is not None  # type: ignore[attr-defined]
        if residual is None:
            total = x.new_empty(0)
            ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, d_y: Tensor, d_total: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, residual, z and weight."""
        x, z, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        add = ctx.add  # type: ignore[attr-defined]
        rows, width = x.shape
        padded, block, warps = _shape(rows, width)
        programs = max(min(triton.cdiv(rows, block), BACKWARD_PROGRAMS), 1)
        d_y = d_y.contiguous()
        d_total = d_total.contiguous() if add else d_y
        d_x = torch.empty(rows, width, dtype=x.dtype, device=x.device)
        d_z = None if z is None else torch.empty(rows, width, dtype=z.dtype, device=x.device)
        d_weight = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        _backward[(programs,)](
            x, x if z is None else z, weight, d_y, d_total, d_x, d_x if d_z is None else d_z,
            d_weight, rows, ctx.eps,  # type: ignore[attr-defined]
            x.stride(0), 0 if z is None else z.stride(0), D=width, BD=padded, BR=block, ADD=add,
            GATE=z is not None, num_warps=warps,
        )  # fmt: skip
        return d_x, d_x if add else None, d_z, d_weight.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The contract of ``qnext.kernels.norm.rms_norm``."""
    y, _ = _Norm.apply(_rows(x), None, None, weight, eps)
    return y.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + residual), x + residual)`` in one pass; both (..., D) in the dtype of x."""
    flat = _rows(residual.to(x.dtype)).contiguous()
    y, total = _Norm.apply(_rows(x), flat, None, weight, eps)
    return y.view(x.shape), total.view(x.shape)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The contract of ``qnext.kernels.norm.gated_rms_norm``, without its inner rounding."""
    y, _ = _Norm.apply(_rows(x), None, _rows(z), weight, eps)
    return y.view(x.shape)
