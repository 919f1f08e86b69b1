"""Causal depthwise convolution with SiLU in Triton, forward and backward.

A program walks 64 tokens of one sequence with a block of channels, the window in registers, four
rows loaded at a time: every row is read once, and only three more per program (six backward).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext.errors import KernelError
from qnext.kernels.gated_delta.triton_chunk import index_chunks

#: (channels per program, warps) forward and backward.
CONFIG = (256, 2)
BACKWARD_CONFIG = (256, 2)


@triton.jit
def _column(
    x, initial, bos, length, n, pos, c, inside, sx,
    C: tl.constexpr, TAPS: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """Inputs at positions ``pos`` of one sequence; before its start those of ``initial``."""
    pos = tl.zeros_like(c) + pos
    live = (pos >= 0) & (pos < length) & inside
    value = tl.load(x + (bos + pos) * sx + c, mask=live, other=0.0).to(tl.float32)
    if INITIAL:
        past = (pos < 0) & (pos >= 1 - TAPS) & inside
        where = initial + (n * C + c) * (TAPS - 1) + pos + (TAPS - 1)
        value += tl.load(where, mask=past, other=0.0).to(tl.float32)
    return value


@triton.jit
def _tap(weight, c, J: tl.constexpr, inside, TAPS: tl.constexpr):
    """Tap J of four; a shorter window has zeros before it."""
    if J + TAPS < 4:
        value = tl.zeros_like(c).to(tl.float32)
    else:
        where = weight + c * TAPS + (J + TAPS - 4)
        value = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _silu_store(where, total, c, inside, live):
    live = (tl.zeros_like(c) + live.to(tl.int32) > 0) & inside
    tl.store(where, (total * tl.sigmoid(total)).to(where.dtype.element_ty), mask=live)


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
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    first = (chunk - tl.load(chunk_first + n)) * 64
    w0 = _tap(weight, c, 0, inside, TAPS)
    w1 = _tap(weight, c, 1, inside, TAPS)
    w2 = _tap(weight, c, 2, inside, TAPS)
    w3 = _tap(weight, c, 3, inside, TAPS)
    at = (initial, bos, length, n)
    x0 = _column(x, *at, first - 3, c, inside, sx, C, TAPS, INITIAL)
    x1 = _column(x, *at, first - 2, c, inside, sx, C, TAPS, INITIAL)
    x2 = _column(x, *at, first - 1, c, inside, sx, C, TAPS, INITIAL)
    for step in range(16):
        pos = first + step * 4
        x3 = _column(x, *at, pos, c, inside, sx, C, TAPS, False)
        x4 = _column(x, *at, pos + 1, c, inside, sx, C, TAPS, False)
        x5 = _column(x, *at, pos + 2, c, inside, sx, C, TAPS, False)
        x6 = _column(x, *at, pos + 3, c, inside, sx, C, TAPS, False)
        out = y + (bos + pos) * C + c
        _silu_store(out, x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3, c, inside, pos < length)
        _silu_store(out + C, x1 * w0 + x2 * w1 + x3 * w2 + x4 * w3, c, inside, pos + 1 < length)
        _silu_store(out + 2 * C, x2 * w0 + x3 * w1 + x4 * w2 + x5 * w3, c, inside, pos + 2 < length)
        _silu_store(out + 3 * C, x3 * w0 + x4 * w1 + x5 * w2 + x6 * w3, c, inside, pos + 3 < length)
        x0 = x4
        x1 = x5
        x2 = x6


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
    return _silu_grad(dy, total)


@triton.jit
def _silu_grad(dy, total):
    gate = tl.sigmoid(total)
    return dy * gate * (1.0 + total * (1.0 - gate))


@triton.jit
def _store_input_grad(
    dx, pos, d_final, d_x, first, length, bos, n, c, inside, C: tl.constexpr, TAPS: tl.constexpr
):
    """Dx at ``pos`` of the chunk that begins at ``first``; others' positions are left out."""
    column = tl.zeros_like(c) + pos
    live = inside & (column >= first) & (column < first + 64) & (column < length)
    late = pos - length + (TAPS - 1)  # >= 0: this input is also a column of the final state
    if late >= 0:
        where = d_final + (n * C + c) * (TAPS - 1) + late
        dx += tl.load(where, mask=live, other=0.0).to(tl.float32)
    tl.store(d_x + (bos + pos) * C + c, dx.to(d_x.dtype.element_ty), mask=live)


@triton.jit
def _backward(
    x, weight, initial, d_y, d_final, d_x, d_weight, cu_seqlens, chunk_sequence, chunk_first, sx,
    C: tl.constexpr, TAPS: tl.constexpr, BC: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """Dx of 64 tokens; their part of dweight, (chunks, taps, C) fp32."""
    chunk = tl.program_id(0)
    n = tl.load(chunk_sequence + chunk).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    part = d_weight + chunk.to(tl.int64) * TAPS * C + c
    if n < 0:
        for j in tl.static_range(TAPS):
            tl.store(part + j * C, tl.zeros((BC,), tl.float32), mask=inside)
        return
    bos = tl.load(cu_seqlens + n).to(tl.int64)
    length = tl.load(cu_seqlens + n + 1) - bos
    first = (chunk - tl.load(chunk_first + n)) * 64
    w0 = _tap(weight, c, 0, inside, TAPS)
    w1 = _tap(weight, c, 1, inside, TAPS)
    w2 = _tap(weight, c, 2, inside, TAPS)
    w3 = _tap(weight, c, 3, inside, TAPS)
    at = (initial, bos, length, n)
    x0 = _column(x, *at, first - 3, c, inside, sx, C, TAPS, INITIAL)
    x1 = _column(x, *at, first - 2, c, inside, sx, C, TAPS, INITIAL)
    x2 = _column(x, *at, first - 1, c, inside, sx, C, TAPS, INITIAL)
    s0 = tl.zeros((BC,), tl.float32)
    s1 = s0
    s2 = s0
    dw0 = s0
    dw1 = s0
    dw2 = s0
    dw3 = s0
    for step in range(17):
        pos = first + step * 4
        x3 = _column(x, *at, pos, c, inside, sx, C, TAPS, False)
        x4 = _column(x, *at, pos + 1, c, inside, sx, C, TAPS, False)
        x5 = _column(x, *at, pos + 2, c, inside, sx, C, TAPS, False)
        x6 = _column(x, *at, pos + 3, c, inside, sx, C, TAPS, False)
        g3 = _column(d_y, *at, pos, c, inside, C, C, TAPS, False)
        g4 = _column(d_y, *at, pos + 1, c, inside, C, C, TAPS, False)
        g5 = _column(d_y, *at, pos + 2, c, inside, C, C, TAPS, False)
        g6 = _column(d_y, *at, pos + 3, c, inside, C, C, TAPS, False)
        s3 = _silu_grad(g3, x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3)
        s4 = _silu_grad(g4, x1 * w0 + x2 * w1 + x3 * w2 + x4 * w3)
        s5 = _silu_grad(g5, x2 * w0 + x3 * w1 + x4 * w2 + x5 * w3)
        s6 = _silu_grad(g6, x3 * w0 + x4 * w1 + x5 * w2 + x6 * w3)
        if step < 16:
            dw0 += s3 * x0 + s4 * x1 + s5 * x2 + s6 * x3
            dw1 += s3 * x1 + s4 * x2 + s5 * x3 + s6 * x4
            dw2 += s3 * x2 + s4 * x3 + s5 * x4 + s6 * x5
            dw3 += s3 * x3 + s4 * x4 + s5 * x5 + s6 * x6
        end = (d_final, d_x, first, length, bos, n, c, inside, C, TAPS)
        _store_input_grad(s0 * w3 + s1 * w2 + s2 * w1 + s3 * w0, pos - 3, *end)
        _store_input_grad(s1 * w3 + s2 * w2 + s3 * w1 + s4 * w0, pos - 2, *end)
        _store_input_grad(s2 * w3 + s3 * w2 + s4 * w1 + s5 * w0, pos - 1, *end)
        _store_input_grad(s3 * w3 + s4 * w2 + s5 * w1 + s6 * w0, pos, *end)
        x0 = x4
        x1 = x5
        x2 = x6
        s0 = s4
        s1 = s5
        s2 = s6
    if TAPS == 4:
        tl.store(part, dw0, mask=inside)
    if TAPS >= 3:
        tl.store(part + (TAPS - 3) * C, dw1, mask=inside)
    if TAPS >= 2:
        tl.store(part + (TAPS - 2) * C, dw2, mask=inside)
    tl.store(part + (TAPS - 1) * C, dw3, mask=inside)


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
    if weight.shape[1] > 4:
        raise KernelError(
            f"causal convolution of {weight.shape[1]} taps on the GPU",
            hint="the kernel has at most 4 taps; use the reference",
        )
    if len(x) == 0:
        shape = (len(cu_seqlens) - 1, x.shape[1], weight.shape[1] - 1)
        return torch.empty_like(x), x.new_zeros(shape) if initial is None else initial.to(x.dtype)
    x = x if x.stride(1) == 1 else x.contiguous()
    start = None if initial is None else initial.contiguous()
    y, final = CausalConv.apply(x, weight.contiguous(), cu_seqlens, start)
    return y, final
