"""Linear of 1..256 rows on Hopper's FP8 tensor cores: weights stream through the copy engine.

Weights lie on the M side of the product and tokens on its narrow N side. Both are e4m3, so that
no thread ever converts a weight: the copy engine (TMA) brings tiles of 128 columns to shared
memory, the tensor cores read them there, and every 128 columns the sums are multiplied by the
weight's block scale and the token's group scale and added in fp32. Weights are requested before
``gdc_wait``, activations after it. BF16 weights take the same path without scales.

K may be cut into parts, whose fp32 sums the next kernel of the step adds up in a fixed order:
then a matrix of few rows still occupies every multiprocessor.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

#: the copy engine's load changed its name after Triton 3.6
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
#: bytes of a row of a tile: one swizzle pattern, 128 FP8 or 64 BF16 columns
ROW_BYTES = 128


@gluon.jit
def _stream(
    w_desc, x_desc, scale, x_scale, y, tile, split, token0, T, N, stride,
    K: gl.constexpr, BM: gl.constexpr, TP: gl.constexpr, NK: gl.constexpr, S: gl.constexpr,
    FP8: gl.constexpr, WAIT: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Rows tile*BM.. of the weight times tokens token0.. over NK steps of K, from step split*NK."""
    BK: gl.constexpr = w_desc.block_type.shape[1]
    dtype: gl.constexpr = w_desc.dtype
    ring: gl.constexpr = S if S < NK else NK
    size: gl.constexpr = w_desc.block_type.nbytes + x_desc.block_type.nbytes
    ALONG: gl.constexpr = 4 if BM == 64 else WARPS
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[ALONG, WARPS // ALONG],
        instr_shape=[16, TP * ALONG // WARPS, 32 if FP8 else 16],
    )
    w_ring = gl.allocate_shared_memory(dtype, [ring, BM, BK], w_desc.layout)
    x_ring = gl.allocate_shared_memory(dtype, [ring, TP, BK], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [ring, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ring):
        mbarrier.init(bars.index(i), count=1)
    row = tile * BM
    first = split * NK
    for i in gl.static_range(ring):
        mbarrier.expect(bars.index(i), size)
        load_tile(w_desc, [row, (first + i) * BK], bars.index(i), w_ring.index(i))
    if WAIT:
        gdc_wait()
    for i in gl.static_range(ring):
        load_tile(x_desc, [token0, (first + i) * BK], bars.index(i), x_ring.index(i))
    token = token0 + gl.arange(0, TP, gl.SliceLayout(0, mma))
    acc = gl.zeros([BM, TP], gl.float32, mma)
    for k in range(NK):
        slot = k % ring
        if FP8:
            s = gl.load(x_scale + token * (K // 128) + first + k, mask=token < T, other=0.0)
            s *= gl.load(scale + (row // 128) * (K // 128) + first + k)
        mbarrier.wait(bars.index(slot), (k // ring) & 1)
        part = warpgroup_mma(
            w_ring.index(slot), x_ring.index(slot).permute([1, 0]),
            gl.zeros([BM, TP], gl.float32, mma), use_acc=False, is_async=True,
        )  # fmt: skip
        part = warpgroup_mma_wait(0, deps=(part,))
        if ring < NK:
            more = k + ring < NK
            mbarrier.expect(bars.index(slot), size, pred=more)
            column = (first + k + ring) * BK
            load_tile(w_desc, [row, column], bars.index(slot), w_ring.index(slot), pred=more)
            load_tile(x_desc, [token0, column], bars.index(slot), x_ring.index(slot), pred=more)
        if FP8:
            acc += part * gl.expand_dims(s, 0)
        else:
            acc += part
    flat: gl.constexpr = gl.BlockedLayout([2, 1], [32, 1], [1, WARPS], [0, 1])
    out = gl.convert_layout(acc.to(y.dtype.element_ty), flat)
    rows = row + gl.arange(0, BM, gl.SliceLayout(1, flat))
    tokens = token0 + gl.arange(0, TP, gl.SliceLayout(0, flat))
    at = (split * T + gl.expand_dims(tokens, 0)) * stride + gl.expand_dims(rows, 1)
    gl.store(y + at, out, mask=(gl.expand_dims(rows, 1) < N) & (gl.expand_dims(tokens, 0) < T))


@gluon.jit
def _linear_stream(
    w_desc, x_desc, scale, x_scale, y, N, tail_desc, wide_desc, tail, N2, T,
    K: gl.constexpr, BM: gl.constexpr, TP: gl.constexpr, SPLIT: gl.constexpr, S: gl.constexpr,
    FP8: gl.constexpr, TAIL: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Programs of the tail (BF16, TAIL parts of K; 0: none) come first, they take longest."""
    if PDL:
        gdc_launch_dependents()
    pid = gl.program_id(0)
    token0 = gl.program_id(1) * TP
    BK: gl.constexpr = w_desc.block_type.shape[1]
    if TAIL > 0:
        if pid < TAIL:
            _stream(tail_desc, wide_desc, scale, x_scale, tail, 0, pid, token0, T, N2, N2, K,
                    64, TP, K // 64 // TAIL, S, False, PDL, WARPS)  # fmt: skip
        else:
            pid -= TAIL
            _stream(w_desc, x_desc, scale, x_scale, y, pid // SPLIT, pid % SPLIT, token0, T, N,
                    N, K, BM, TP, K // BK // SPLIT, S, FP8, PDL, WARPS)  # fmt: skip
    else:
        _stream(w_desc, x_desc, scale, x_scale, y, pid // SPLIT, pid % SPLIT, token0, T, N, N,
                K, BM, TP, K // BK // SPLIT, S, FP8, PDL, WARPS)  # fmt: skip


def tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """Boxes of ``rows`` x 128 bytes of a matrix for the copy engine."""
    width = ROW_BYTES // x.element_size()
    kind = gl.float8e4nv if x.dtype == torch.float8_e4m3fn else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for([rows, width], kind)
    return TensorDescriptor.from_tensor(x, [rows, width], layout)


def token_tile(tokens: int) -> int:
    """Tokens on the narrow side of a product."""
    return min(128, max(8, triton.next_power_of_2(tokens)))


def stream_linear(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    scale_inv: Tensor | None,
    out: Tensor,
    *,
    tail: tuple[Tensor, Tensor, Tensor] | None = None,
    split: int = 1,
    rows: int = 64,
    stages: int = 6,
    pdl: bool = False,
) -> Tensor:
    """``x @ weight.T`` with FP8 (or BF16) operands on both sides.

    Args:
        x: (T, K) e4m3 with ``x_scale`` (T, K / 128) fp32, or BF16 with None.
        x_scale: scale of each token's group of 128 channels.
        weight: (N, K) in the dtype of ``x``, K a multiple of 128.
        scale_inv: (N / 128, K / 128) scales of the weight's blocks, or None.
        out: (T, N) BF16 or fp32 with ``split`` 1, else (split, T, N) fp32 partial sums.
        tail: second BF16 matrix (N2 <= 64, K), the BF16 x (T, K), and its fp32 output
            (parts, T, N2) of partial sums.
        split: parts of K.
        rows: weight rows per program, 64 or 128.
        stages: tiles in flight per program.
        pdl: launch with programmatic stream serialization.
    """
    t, k = x.shape
    n = weight.shape[0]
    fp8 = scale_inv is not None
    tp = token_tile(t)
    w_desc, x_desc = tiles(weight, rows), tiles(x, tp)
    warps = 8 if rows == 128 and tp == 128 else 4
    parts, second = 0, (w_desc, x_desc, out, 0)
    if tail is not None:
        small, wide, tail_out = tail
        parts = tail_out.shape[0]
        second = (tiles(small, 64), tiles(wide, tp), tail_out, small.shape[0])
    _linear_stream[(triton.cdiv(n, rows) * split + parts, triton.cdiv(t, tp))](
        w_desc, x_desc, scale_inv if fp8 else out, x_scale if fp8 else out, out, n, *second, t,
        K=k, BM=rows, TP=tp, SPLIT=split, S=stages, FP8=fp8, TAIL=parts, PDL=pdl,
        WARPS=warps, num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    return out
