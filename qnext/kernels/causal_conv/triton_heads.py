"""DeltaNet's input side for prefill in one Triton launch.

Projections in, what the chunked rule wants out: causal convolution, SiLU, L2-normalised queries
(already times ``dk ** -0.5``) and keys, values, log decay and write strength, and the window that
the next piece of the sequence needs. A program walks 64 tokens of one sequence with two heads, the
convolution's window in registers, four rows loaded at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext.kernels.causal_conv.triton import _column, _tap
from qnext.kernels.gated_delta.triton_chunk import index_chunks


@dataclass(frozen=True)
class DeltaInputs:
    """What ``chunk_gated_delta_rule`` takes: q, k (T, Hk, dk), v (T, Hv, dv), g, beta (T, Hv)."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    window: Tensor


@triton.jit
def _gates(
    ba, a_log, dt_bias, g, beta, row, live, s_ba, HV: tl.constexpr, HP: tl.constexpr
):  # fmt: skip
    h = tl.arange(0, HP)[None, :]
    here = live & (h < HV)
    b = tl.load(ba + row * s_ba + h, mask=here, other=0.0).to(tl.float32)
    a = tl.load(ba + row * s_ba + HV + h, mask=here, other=0.0).to(tl.float32)
    a += tl.load(dt_bias + h, mask=h < HV, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(a_log + h, mask=h < HV, other=0.0).to(tl.float32))
    soft = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
    tl.store(g + row * HV + h, -rate * soft, mask=here)
    tl.store(beta + row * HV + h, tl.sigmoid(b), mask=here)


@triton.jit
def _finish(
    x0, x1, x2, x3, w0, w1, w2, w3, where, live, unit, unit_norm,
    HEADS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One row: convolution, SiLU, and for queries and keys the L2 norm of each head."""
    y = x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
    y /= 1.0 + tl.exp(-y)
    # as the unfused path: the convolution's output is a number of the input's width
    y = y.to(where.dtype.element_ty).to(tl.float32)
    square = tl.sum(tl.reshape(y * y, [HEADS, D]), 1)
    factor = tl.where(unit_norm, tl.rsqrt(square + 1e-6) * unit, 1.0)
    y = tl.reshape(tl.reshape(y, [HEADS, D]) * factor[:, None], [HEADS * D])
    tl.store(where, y.to(where.dtype.element_ty), mask=live)


@triton.jit
def _heads(
    x, weight, initial, ba, a_log, dt_bias, q, k, v, g, beta, window,
    cu_seqlens, chunk_sequence, chunk_first, s_x, s_ba,
    HK: tl.constexpr, HV: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr,
    INITIAL: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1)
    n = tl.load(chunk_sequence + chunk)
    if n < 0:
        return
    C: tl.constexpr = (2 * HK + HV) * D
    bos = tl.load(cu_seqlens + n).to(tl.int64)
    length = tl.load(cu_seqlens + n + 1) - tl.load(cu_seqlens + n)
    first = (chunk - tl.load(chunk_first + n)) * 64
    head = tl.program_id(0) * HEADS
    if head >= 2 * HK + HV:
        for i in range(8):
            pos = first + i * 8 + tl.arange(0, 8)[:, None]
            _gates(ba, a_log, dt_bias, g, beta, bos + pos, pos < length, s_ba, HV, HP)
        return
    c = head * D + tl.arange(0, HEADS * D)
    at = (initial, bos, length, n.to(tl.int64))
    every = c >= 0
    w0 = _tap(weight, c, 0, every, TAPS)
    w1 = _tap(weight, c, 1, every, TAPS)
    w2 = _tap(weight, c, 2, every, TAPS)
    w3 = _tap(weight, c, 3, every, TAPS)
    x0 = _column(x, *at, first - 3, c, every, s_x, C, TAPS, INITIAL)
    x1 = _column(x, *at, first - 2, c, every, s_x, C, TAPS, INITIAL)
    x2 = _column(x, *at, first - 1, c, every, s_x, C, TAPS, INITIAL)
    # where the heads of this program go: queries, keys or values
    norm = head < 2 * HK
    unit = tl.where(head < HK, D**-0.5, 1.0)
    out = tl.where(head < HK, q, tl.where(norm, k - HK * D, v - 2 * HK * D)) + c
    step = tl.where(norm, HK * D, HV * D)
    out += (bos + first) * step
    for i in range(16):
        pos = first + i * 4
        x3 = _column(x, *at, pos, c, every, s_x, C, TAPS, False)
        x4 = _column(x, *at, pos + 1, c, every, s_x, C, TAPS, False)
        x5 = _column(x, *at, pos + 2, c, every, s_x, C, TAPS, False)
        x6 = _column(x, *at, pos + 3, c, every, s_x, C, TAPS, False)
        taps = (w0, w1, w2, w3)
        to = (unit, norm)
        _finish(x0, x1, x2, x3, *taps, out, c * 0 + pos < length, *to, HEADS, D)
        _finish(x1, x2, x3, x4, *taps, out + step, c * 0 + pos + 1 < length, *to, HEADS, D)
        _finish(x2, x3, x4, x5, *taps, out + 2 * step, c * 0 + pos + 2 < length, *to, HEADS, D)
        _finish(x3, x4, x5, x6, *taps, out + 3 * step, c * 0 + pos + 3 < length, *to, HEADS, D)
        x0 = x4
        x1 = x5
        x2 = x6
        out += 4 * step
    if first + 64 >= length:
        for j in tl.static_range(TAPS - 1):
            pos = length - (TAPS - 1) + j
            last = _column(x, *at, pos, c, every, s_x, C, TAPS, INITIAL)
            to = window + (n.to(tl.int64) * C + c) * (TAPS - 1) + j
            tl.store(to, last.to(window.dtype.element_ty))


def delta_inputs(
    qkv: Tensor,
    ba: Tensor,
    weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    cu_seqlens: Tensor,
    window: Tensor | None,
    *,
    key_heads: int,
    value_heads: int,
    index: tuple[int, Tensor, Tensor] | None = None,
    config: tuple[int, int] = (2, 1),
) -> DeltaInputs:
    """Convolution, SiLU, L2 norms and gates of packed sequences, none of them empty.

    Args:
        qkv: (T, C), rows may be strided; queries, keys, values, each head contiguous.
        ba: (T, 2 Hv), rows may be strided: strength and then decay projections.
        weight: (C, taps) of the convolution.
        a_log, dt_bias: (Hv,).
        cu_seqlens: (N + 1,) int32.
        window: (N, C, taps - 1) inputs before each sequence, or None for zeros.
        key_heads, value_heads: heads of queries and keys, and of values; all of the same width.
        index: of ``index_chunks``, where several layers share it.
        config: heads and warps of a program; a warp holds 256 channels, 16 bytes a lane.
    """
    tokens, channels = qkv.shape
    taps, sequences = weight.shape[1], len(cu_seqlens) - 1
    width = channels // (2 * key_heads + value_heads)
    chunks, *where = index or index_chunks(cu_seqlens, tokens)
    new = qkv.new_empty
    q, k = new(tokens, key_heads, width), new(tokens, key_heads, width)
    v, end = new(tokens, value_heads, width), new(sequences, channels, taps - 1)
    g = new(tokens, value_heads, dtype=torch.float32)
    beta = torch.empty_like(g)
    each, warps = config
    while key_heads % each or value_heads % each:
        each //= 2
    _heads[((2 * key_heads + value_heads) // each + 1, chunks)](
        qkv, weight, end if window is None else window, ba, a_log, dt_bias, q, k, v, g, beta, end,
        cu_seqlens, *where, qkv.stride(0), ba.stride(0), HK=key_heads, HV=value_heads,
        HP=triton.next_power_of_2(value_heads), D=width, TAPS=taps, INITIAL=window is not None,
        HEADS=each, num_warps=warps,
    )  # fmt: skip
    return DeltaInputs(q, k, v, g, beta, end)
