"""Chunked gated delta rule on Hopper, forward only: two launches, for prefill (spec 4.5).

``_prepare`` makes, for every chunk of 64 tokens and value head at once, P = lower(Q K^T D) and the
paper's W = M (beta e^G K) and U = M (beta V), M = (I + A)^-1. ``_walk`` goes through the chunks of
one sequence for 64 value columns. It is warp-specialised: one warpgroup owns the state and does
only what the next chunk waits for, V' = U - W S and S = decay S + K^T V', with the state in its
registers (what it hands on is stored while S is multiplied); a second one follows with the outputs
e^G Q S + P V'; a warp of copies runs ahead. Everything of the first group is turned, values by
tokens, so that its own results are the left operands of its next products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qnext.kernels.gated_delta.triton_chunk import _double, index_chunks, rows
from qnext.kernels.hopper import barrier, load_tile

STAGES = 3
#: Registers of a thread of the output group and of the copying warp.
REGISTERS = (168, 40)


@triton.jit
def _prepare(
    q, k, v, g, beta, gates, W, U, P, cu_seqlens, chunk_sequence, chunk_first, sq, sk, sv,
    RATIO: tl.constexpr, HV: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One chunk and value head; see ``triton_chunk._scores`` for the inverse.

    ``gates`` (chunks, Hv, 2, 64) is e^G and e^(Gn - G); U is stored values by tokens.
    """
    h = tl.program_id(0)
    chunk = tl.program_id(1)
    n = tl.load(chunk_sequence + chunk)
    if n < 0:
        return
    bos = tl.load(cu_seqlens + n)
    eos = tl.load(cu_seqlens + n + 1)
    i = tl.arange(0, 64)
    d = tl.arange(0, D)
    row = bos + (chunk - tl.load(chunk_first + n)) * 64 + i
    live = row < eos
    at = row.to(tl.int64)[:, None]
    hk = h // RATIO
    block = (chunk * HV + h).to(tl.int64)
    gt = tl.load(g + row.to(tl.int64) * HV + h, mask=live, other=0.0)
    bt = tl.load(beta + row.to(tl.int64) * HV + h, mask=live, other=0.0)
    kt = tl.load(k + at * sk + hk * D + d[None, :], mask=live[:, None], other=0.0)
    qt = tl.load(q + at * sq + hk * D + d[None, :], mask=live[:, None], other=0.0)
    vt = tl.load(v + at * sv + h * D + d[None, :], mask=live[:, None], other=0.0)
    G = tl.cumsum(gt, 0)
    grown = tl.exp(G)
    tl.store(gates + block * 128 + i, grown)
    tl.store(gates + block * 128 + 64 + i, tl.exp(tl.sum(gt, 0) - G))
    r = i[:, None]
    c = i[None, :]
    decay = tl.exp(tl.where(r >= c, G[:, None] - G[None, :], float("-inf")))
    qk = tl.dot(qt, tl.trans(kt))
    tl.store(P + block * 4096 + r * 64 + c, (qk * decay).to(P.dtype.element_ty))
    kk = tl.dot(kt, tl.trans(kt))
    A = tl.where(r > c, kk * decay * bt[:, None], 0.0).to(tl.float16)
    inverse = tl.where(r == c, 1.0, tl.where(r // 2 == c // 2, -A.to(tl.float32), 0.0))
    for level in tl.static_range(1, 6):
        inverse = _double(inverse, A, r, c, level, "tf32")
    M = inverse.to(kt.dtype)
    kb = (kt.to(tl.float32) * (bt * grown)[:, None]).to(kt.dtype)
    vb = (vt.to(tl.float32) * bt[:, None]).to(kt.dtype)
    w = tl.dot(M, kb)
    tl.store(W + block * (64 * D) + r * D + d[None, :], w.to(W.dtype.element_ty))
    u = tl.dot(tl.trans(vb), tl.trans(M))
    tl.store(U + block * (64 * D) + d[:, None] * 64 + c, u.to(U.dtype.element_ty))


@gluon.jit
def _copies(
    q, k, w, u, p, gates, bos, first, chunks, h, tile, sq, sk, sw, su, sp, sg, full, empty,
    RATIO: gl.constexpr, HV: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for c in range(chunks):
        s = c % STAGES
        bar = full.index(s)
        mbarrier.wait(empty.index(s), (c // STAGES & 1) ^ 1)
        mbarrier.expect(bar, 64 * D * 2 * 3 + 64 * 64 * 2 * 2 + 128 * 4)
        block = (first + c) * HV + h
        load_tile(w, [block * 64, 0], bar, sw.index(s))
        load_tile(u, [block * D + tile * 64, 0], bar, su.index(s))
        load_tile(k, [bos + c * 64, h // RATIO * D], bar, sk.index(s))
        load_tile(q, [bos + c * 64, h // RATIO * D], bar, sq.index(s))
        load_tile(p, [block * 64, 0], bar, sp.index(s))
        load_tile(gates, [block, 0], bar, sg.index(s))


@gluon.jit
def _state(
    initial, final, n, chunks, h, tile, sk, sw, su, sg, ss, sv, full, empty,
    ready, free,
    HV: gl.constexpr, D: gl.constexpr, INITIAL: gl.constexpr, STAGES: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    left_wide: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    e = tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, wide))
    d = gl.arange(0, D, gl.SliceLayout(0, wide))
    corner = (n * HV + h).to(gl.int64) * (D * D) + d[None, :] * D + e[:, None]
    S = gl.load(initial + corner) if INITIAL else gl.zeros([64, D], gl.float32, wide)
    zero = gl.zeros([64, 64], gl.float32, narrow)
    for c in range(chunks):
        s = c % STAGES
        small = S.to(DTYPE)
        mbarrier.wait(full.index(s), c // STAGES & 1)
        y = warpgroup_mma(
            gl.convert_layout(small, left), sw.index(s).permute((1, 0)), zero, use_acc=False,
            is_async=True,
        )  # fmt: skip
        line = sg.index(s).reshape((128,))
        fading = line.slice(64, 64).load(gl.SliceLayout(0, narrow))
        decay = line.slice(63, 1).load(gl.SliceLayout(1, wide))
        S *= decay[:, None]
        u = su.index(s).load(narrow)
        y = warpgroup_mma_wait(0, deps=[y])
        value = u.to(gl.float32) - y
        faded = gl.convert_layout((value * fading[None, :]).to(DTYPE), left_wide)
        S = warpgroup_mma(faded, sk.index(s), S, is_async=True)
        mbarrier.wait(free, (c & 1) ^ 1)
        ss.store(small)
        sv.store(value.to(DTYPE))
        fence_async_shared()
        barrier()
        mbarrier.arrive(ready, count=1)
        S = warpgroup_mma_wait(0, deps=[S])
        barrier()
        mbarrier.arrive(empty.index(s), count=1)
    gl.store(final + corner, S)


@gluon.jit
def _outputs(
    o, bos, length, chunks, h, tile, sq, sp, sg, ss, sv, full, empty,
    ready, free,
    HV: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    r = gl.arange(0, 64, gl.SliceLayout(1, lines))
    e = tile * 64 + gl.arange(0, 64, gl.SliceLayout(0, lines))
    zero = gl.zeros([64, 64], gl.float32, mma)
    for c in range(chunks):
        s = c % STAGES
        mbarrier.wait(full.index(s), c // STAGES & 1)
        grown = sg.index(s).reshape((128,)).slice(0, 64).load(gl.SliceLayout(1, mma))
        mbarrier.wait(ready, c & 1)
        out = warpgroup_mma(sq.index(s), ss.permute((1, 0)), zero, use_acc=False, is_async=True)
        out = warpgroup_mma_wait(0, deps=[out])
        out = warpgroup_mma(sp.index(s), sv.permute((1, 0)), out * grown[:, None], is_async=True)
        out = warpgroup_mma_wait(0, deps=[out])
        barrier()
        mbarrier.arrive(free, count=1)
        mbarrier.arrive(empty.index(s), count=1)
        rows_ = c * 64 + r
        at = o + ((bos + rows_).to(gl.int64) * HV + h)[:, None] * D + e[None, :]
        line = gl.convert_layout(out.to(o.dtype.element_ty), lines)
        gl.store(at, line, mask=(rows_ < length)[:, None])


@gluon.jit
def _walk(
    q, k, w, u, p, gates, o, initial, final, cu_seqlens, chunk_first,
    RATIO: gl.constexpr, HV: gl.constexpr, D: gl.constexpr, INITIAL: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    pid = gl.program_id(0)
    tile = pid % (D // 64)
    h = pid // (D // 64) % HV
    n = pid // (D // 64 * HV)
    bos = gl.load(cu_seqlens + n)
    length = gl.load(cu_seqlens + n + 1) - bos
    chunks = (length + 63) // 64
    first = gl.load(chunk_first + n)
    dtype: gl.constexpr = q.dtype
    sq = gl.allocate_shared_memory(dtype, [STAGES, 64, D], q.layout)
    sk = gl.allocate_shared_memory(dtype, [STAGES, 64, D], k.layout)
    sw = gl.allocate_shared_memory(dtype, [STAGES, 64, D], w.layout)
    su = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], u.layout)
    sp = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], p.layout)
    sg = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 128], gates.layout)
    ss = gl.allocate_shared_memory(dtype, [64, D], q.layout)
    sv = gl.allocate_shared_memory(dtype, [64, 64], p.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    mbarrier.init(ready, count=1)
    mbarrier.init(free, count=1)
    barrier()
    gl.warp_specialize(
        [
            (_state, (initial, final, n, chunks, h, tile, sk, sw, su, sg, ss, sv, full, empty,
                      ready, free, HV, D, INITIAL, STAGES, dtype)),
            (_outputs, (o, bos, length, chunks, h, tile, sq, sp, sg, ss, sv, full, empty, ready,
                        free, HV, D, STAGES)),
            (_copies, (q, k, w, u, p, gates, bos, first, chunks, h, tile, sq, sk, sw, su, sp, sg,
                       full, empty, RATIO, HV, D, STAGES)),
        ],
        [4, 1],
        [REGISTERS[0], REGISTERS[1]],
    )  # fmt: skip


def prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor,
    index: tuple[int, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``(gates, W, U, P)`` of all chunks; see ``_prepare``."""
    (_, key_heads, d), heads = k.shape, v.shape[1]
    chunks, *where = index
    gates = torch.empty(chunks, heads, 2, 64, dtype=torch.float32, device=v.device)
    w = torch.empty(chunks, heads, 64, d, dtype=v.dtype, device=v.device)
    u = torch.empty(chunks, heads, d, 64, dtype=v.dtype, device=v.device)
    p = torch.empty(chunks, heads, 64, 64, dtype=v.dtype, device=v.device)
    _prepare[(heads, chunks)](
        q, k, v, g, beta, gates, w, u, p, cu_seqlens, *where, q.stride(0), k.stride(0),
        v.stride(0), RATIO=heads // key_heads, HV=heads, D=d, num_warps=4, num_stages=1,
    )  # fmt: skip
    return gates, w, u, p


def walk(
    q: Tensor, k: Tensor, prepared: tuple[Tensor, ...], cu_seqlens: Tensor,
    chunk_first: Tensor, initial: Tensor | None, stages: int = STAGES,
    registers: tuple[int, int] = REGISTERS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(o, final state)`` from what ``prepare`` gave."""
    gates, w, u, p = prepared
    (tokens, key_heads, d), heads = k.shape, w.shape[1]
    sequences = len(cu_seqlens) - 1
    o = torch.empty(tokens, heads, d, dtype=q.dtype, device=q.device)
    final = torch.empty(sequences, heads, d, d, dtype=torch.float32, device=q.device)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

    def tiles(x: Tensor, width: int, block: int) -> TensorDescriptor:
        flat = x.view(-1, width)
        return TensorDescriptor.from_tensor(flat, [64, block], layout)

    lines = TensorDescriptor.from_tensor(
        gates.view(-1, 128), [1, 128], gl.NVMMASharedLayout(0, element_bitwidth=32, rank=2)
    )
    _walk[(sequences * heads * (d // 64),)](
        tiles(q, key_heads * d, d), tiles(k, key_heads * d, d), tiles(w, d, d), tiles(u, 64, 64),
        tiles(p, 64, 64), lines, o, final if initial is None else initial, final, cu_seqlens,
        chunk_first, RATIO=heads // key_heads, HV=heads, D=d, INITIAL=initial is not None,
        STAGES=stages, REGISTERS=registers, num_warps=4,
    )  # fmt: skip
    return o, final


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    index: tuple[int, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The contract of ``qnext.kernels.gated_delta``: 16 bits, heads of 128, Hopper, T not 0.

    ``index`` is that of ``index_chunks``, where several layers share it.
    """
    q, k, v = q.to(v.dtype).contiguous(), k.to(v.dtype).contiguous(), rows(v)
    index = index or index_chunks(cu_seqlens, len(v))
    initial = None if initial_state is None else initial_state.float().contiguous()
    gates = g.float().contiguous(), beta.float().contiguous()
    prepared = prepare(q, k, v, *gates, cu_seqlens, index)
    return walk(q, k, prepared, cu_seqlens, index[2], initial)
