"""Causal depthwise convolution with SiLU in Triton, forward and backward.

A program owns 64 tokens of one sequence and a block of channels. Shifted rows are loaded again
for each tap (they hit the L1 cache); nothing between input and output goes through memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext.kernels.gated_delta.triton_chunk import index_chunks

#: (channels per program, warps) forward and backward.
CONFIG = (64, 4)
BACKWARD_CONFIG = (64, 8)


@triton.jit
def _column(
    x, initial, bos, length, n, pos, c, inside, sx,
    C: tl.constexpr, TAPS: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """Inputs at positions ``pos`` of one sequence; before its start those of ``initial``."""
    live = (pos >= 0) & (pos < length) & inside
    value = tl.load(x + (bos + pos) * sx + c, mask=live, other=0.0).to(tl.float32)
    if INITIAL:
        past = (pos < 0) & (pos >= 1 - TAPS) & inside
        where = initial + (n * C + c) * (TAPS - 1) + pos + (TAPS - 1)
        value += tl.load(where, mask=past, other=0.0).to(tl.float32)
    return value


@triton.jit
def _forward(
    x, weight, initial, y, cu_seqlens, chunk_sequence, chunk_first, sx,
    C: tl.constexpr, TAPS: tl.constexpr, BC: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    n = tl.load(chunk_sequence + chunk).to(tl.int64)
    if n < 0:
        return
    bos = tl.load(cu_seqlens + n).to(tl.int64)
    length = tl.load(cu_seqlens + n + 1) - bos
    c = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    inside = c < C
    pos = ((chunk - tl.load(chunk_first + n)) * 64 + tl.arange(0, 64))[:, None]
    total = tl.zeros((64, BC), tl.float32)
    for j in tl.static_range(TAPS):
        w = tl.load(weight + c * TAPS + j, mask=inside, other=0.0).to(tl.float32)
        total += w * _column(
            x, initial, bos, length, n, pos + (j + 1 - TAPS), c, inside, sx, C, TAPS, INITIAL
        )
    out = total * tl.sigmoid(total)
    live = (pos < length) & inside
    tl.store(y + (bos + pos) * C + c, out.to(y.dtype.element_ty), mask=live)


@triton.jit
def _final(
    x, initial, final, cu_seqlens, sx,
    C: tl.constexpr, TAPS: tl.constexpr, BC: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    bos = tl.load(cu_seqlens + n).to(tl.int64)
    length = tl.load(cu_seqlens + n + 1) - bos
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    for j in tl.static_range(TAPS - 1):
        pos = tl.zeros_like(c) + (length - (TAPS - 1) + j)
        value = _column(x, initial, bos, length, n, pos, c, inside, sx, C, TAPS, INITIAL)
        where = final + (n * C + c) * (TAPS - 1) + j
        tl.store(where, value.to(final.dtype.element_ty), mask=inside)


@triton.jit
def _before_silu_grad(
    x, weight, initial, d_y, bos, length, n, pos, c, inside, sx,
    C: tl.constexpr, TAPS: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """Gradient of the convolution's sum at ``pos`` (0 outside the sequence)."""
    total = 0.0
    for j in tl.static_range(TAPS):
        w = tl.load(weight + c * TAPS + j, mask=inside, other=0.0).to(tl.float32)
        total += w * _column(
            x, initial, bos, length, n, pos + (j + 1 - TAPS), c, inside, sx, C, TAPS, INITIAL
        )
    live = (pos >= 0) & (pos < length) & inside
    dy = tl.load(d_y + (bos + pos) * C + c, mask=live, other=0.0).to(tl.float32)
    gate = tl.sigmoid(total)
    return dy * gate * (1.0 + total * (1.0 - gate))


@triton.jit
def _backward(
    x, weight, initial, d_y, d_final, d_x, d_weight, cu_seqlens, chunk_sequence, chunk_first, sx,
    C: tl.constexpr, TAPS: tl.constexpr, BC: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """Dx of 64 tokens; their part of dweight, (chunks, taps, C) fp32."""
    chunk = tl.program_id(0)
    n = tl.load(chunk_sequence + chunk).to(tl.int64)
    c = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    inside = c < C
    part = d_weight + chunk.to(tl.int64) * TAPS * C + c
    if n < 0:
        for j in tl.static_range(TAPS):
            tl.store(part + j * C, tl.zeros((1, BC), tl.float32), mask=inside)
        return
    bos = tl.load(cu_seqlens + n).to(tl.int64)
    length = tl.load(cu_seqlens + n + 1) - bos
    pos = ((chunk - tl.load(chunk_first + n)) * 64 + tl.arange(0, 64))[:, None]
    live = (pos < length) & inside
    late = pos - length + (TAPS - 1)  # >= 0: this input is also a column of the final state
    where = d_final + (n * C + c) * (TAPS - 1) + late
    dx = tl.load(where, mask=live & (late >= 0), other=0.0).to(tl.float32)
    for s in tl.static_range(TAPS):
        ds = _before_silu_grad(
            x, weight, initial, d_y, bos, length, n, pos + s, c, inside, sx, C, TAPS, INITIAL
        )
        w = tl.load(weight + c * TAPS + (TAPS - 1 - s), mask=inside, other=0.0).to(tl.float32)
        dx += w * ds
        if s == 0:
            for j in tl.static_range(TAPS):
                value = _column(
                    x, initial, bos, length, n, pos + (j + 1 - TAPS), c, inside, sx, C, TAPS,
                    INITIAL,
                )  # fmt: skip
                dw = tl.sum(ds * value, 0)[None, :]
                tl.store(part + j * C, dw, mask=inside)
    tl.store(d_x + (bos + pos) * C + c, dx.to(d_x.dtype.element_ty), mask=live)


@triton.jit
def _initial_grad(
    x, weight, initial, d_y, d_final, d_initial, cu_seqlens, sx,
    C: tl.constexpr, TAPS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    bos = tl.load(cu_seqlens + n).to(tl.int64)
    length = tl.load(cu_seqlens + n + 1) - bos
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    corner = (n * C + c) * (TAPS - 1)
    for m in tl.static_range(TAPS - 1):
        # in a sequence shorter than the window, column m moves on to column m - length
        here = (tl.zeros_like(c) + m >= length) & inside
        total = tl.load(d_final + corner + m - length, mask=here, other=0.0).to(tl.float32)
        for t in tl.static_range(m + 1):
            pos = tl.zeros_like(c) + t
            ds = _before_silu_grad(
                x, weight, initial, d_y, bos, length, n, pos, c, inside, sx, C, TAPS, True
            )
            w = tl.load(weight + c * TAPS + (m - t), mask=inside, other=0.0).to(tl.float32)
            total += w * ds
        tl.store(d_initial + corner + m, total.to(d_initial.dtype.element_ty), mask=inside)


class CausalConv(torch.autograd.Function):
    """Keeps its inputs; the backward makes the convolution's sums again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        cu_seqlens: Tensor,
        initial: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See :func:`causal_conv`."""
        tokens, channels = x.shape
        taps, sequences = weight.shape[1], len(cu_seqlens) - 1
        width, warps = CONFIG
        blocks = triton.cdiv(channels, width)
        shape = {"C": channels, "TAPS": taps, "BC": width, "INITIAL": initial is not None}
        start = x if initial is None else initial
        y = torch.empty(tokens, channels, dtype=x.dtype, device=x.device)
        final = torch.empty(sequences, channels, taps - 1, dtype=x.dtype, device=x.device)
        chunks, *index = index_chunks(cu_seqlens, tokens)
        _forward[(chunks, blocks)](
            x, weight, start, y, cu_seqlens, *index, x.stride(0), num_warps=warps, **shape
        )
        _final[(sequences, blocks)](x, start, final, cu_seqlens, x.stride(0), num_warps=1, **shape)
        ctx.save_for_backward(x, weight, cu_seqlens, initial)  # type: ignore[arg-type]
        return y, final

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, d_y: Tensor, d_final: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and initial."""
        x, weight, cu_seqlens, initial = ctx.saved_tensors  # type: ignore[attr-defined]
        tokens, channels = x.shape
        taps, sequences = weight.shape[1], len(cu_seqlens) - 1
        width, warps = BACKWARD_CONFIG
        blocks = triton.cdiv(channels, width)
        shape = {"C": channels, "TAPS": taps, "BC": width}
        d_y, d_final = d_y.contiguous(), d_final.contiguous()
        chunks, *index = index_chunks(cu_seqlens, tokens)
        d_x = torch.empty(tokens, channels, dtype=x.dtype, device=x.device)
        d_weight = torch.empty(chunks, taps, channels, dtype=torch.float32, device=x.device)
        _backward[(chunks, blocks)](
            x, weight, x if initial is None else initial, d_y, d_final, d_x, d_weight, cu_seqlens,
            *index, x.stride(0), INITIAL=initial is not None, num_warps=warps, **shape,
        )  # fmt: skip
        d_initial = None
        if initial is not None and ctx.needs_input_grad[3]:  # type: ignore[attr-defined]
            d_initial = torch.empty_like(initial)
            _initial_grad[(sequences, blocks)](
                x, weight, initial, d_y, d_final, d_initial, cu_seqlens, x.stride(0), num_warps=1,
                **shape,
            )  # fmt: skip
        return d_x, d_weight.sum(0).t().to(weight.dtype), None, d_initial


def causal_conv(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The contract of ``qnext.kernels.causal_conv``; rows of x may be strided."""
    if len(x) == 0:
        shape = (len(cu_seqlens) - 1, x.shape[1], weight.shape[1] - 1)
        return torch.empty_like(x), x.new_zeros(shape) if initial is None else initial.to(x.dtype)
    x = x if x.stride(1) == 1 else x.contiguous()
    start = None if initial is None else initial.contiguous()
    y, final = CausalConv.apply(x, weight.contiguous(), cu_seqlens, start)
    return y, final
