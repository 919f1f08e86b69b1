"""Chunked gated delta rule in Triton, forward: three launches (spec 4.5, arXiv 2412.06464).

``_scores`` makes, per chunk and key head, A and P of every value head; ``_invert`` makes
M = (I + A)^-1 by blocks of 16; ``_states`` walks the chunks of one sequence serially for one tile
of value columns and writes the outputs as it goes. W and U of the paper are never stored:
V' = M (beta (V - e^G K S)), so one chunk reads K, Q, V, M, P once and writes O.
The backward is in ``triton_chunk_grad.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64

#: (least value columns in flight, columns per program, warps, stages), widest tile first. A wide
#: tile rereads K, Q, M and P less often, a narrow one fills more multiprocessors.
STATE_CONFIGS = {
    "many": (64, 4, 2),
    "few": (32, 4, 3),
}
#: Programs of the wide tile from which it is the better one (132 multiprocessors on H100, H200).
WIDE_FROM = 132


@triton.jit
def _index(cu_seqlens, chunk_sequence, chunk_first, N, MAX, BLOCK: tl.constexpr):
    """Program n: number of the first chunk of sequence n, and n for each of its chunks."""
    n = tl.program_id(0)
    before = 0
    for start in range(0, N, BLOCK):
        m = start + tl.arange(0, BLOCK)
        length = tl.load(cu_seqlens + m + 1, mask=m < n, other=0) - tl.load(
            cu_seqlens + m, mask=m < n, other=0
        )
        before += tl.sum((length + 63) // 64, 0)
    tl.store(chunk_first + n, before)
    count = (tl.load(cu_seqlens + n + 1) - tl.load(cu_seqlens + n) + 63) // 64
    for start in range(0, count, BLOCK):
        c = start + tl.arange(0, BLOCK)
        tl.store(chunk_sequence + before + c, tl.zeros_like(c) + n, mask=c < count)
    if n == N - 1:
        for start in range(before + count, MAX, BLOCK):
            c = start + tl.arange(0, BLOCK)
            tl.store(chunk_sequence + c, tl.zeros_like(c) - 1, mask=c < MAX)


@triton.jit
def _scores(
    q, k, g, beta, gates, A, P, cu_seqlens, chunk_sequence, chunk_first, sq, sk,
    RATIO: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per chunk and key head: G, A = lower(beta K K^T D) and P = lower(Q K^T D).

    ``gates`` is (chunks, Hv, 2, 64): G and beta, so that later kernels read them in one piece.
    """
    chunk = tl.program_id(0)
    hk = tl.program_id(1)
    n = tl.load(chunk_sequence + chunk)
    if n < 0:
        return
    bos = tl.load(cu_seqlens + n)
    eos = tl.load(cu_seqlens + n + 1)
    i = tl.arange(0, 64)
    j = tl.arange(0, 64)
    d = tl.arange(0, DK)
    row = bos + (chunk - tl.load(chunk_first + n)) * 64 + i
    live = row < eos
    at = row.to(tl.int64)[:, None]
    kt = tl.load(k + at * sk + hk * DK + d[None, :], mask=live[:, None], other=0.0)
    qt = tl.load(q + at * sq + hk * DK + d[None, :], mask=live[:, None], other=0.0)
    kk = tl.dot(kt, tl.trans(kt), input_precision=PRECISION)
    qk = tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
    square = i[:, None] * 64 + j[None, :]
    for r in range(RATIO):
        h = hk * RATIO + r
        gt = tl.load(g + row.to(tl.int64) * HV + h, mask=live, other=0.0)
        bt = tl.load(beta + row.to(tl.int64) * HV + h, mask=live, other=0.0)
        G = tl.cumsum(gt, 0)
        block = (chunk * HV + h).to(tl.int64)
        tl.store(gates + block * 128 + i, G)
        tl.store(gates + block * 128 + 64 + i, bt)
        gap = tl.where(i[:, None] >= j[None, :], G[:, None] - G[None, :], float("-inf"))
        D = tl.exp(gap)
        a = tl.where(i[:, None] > j[None, :], kk * D * bt[:, None], 0.0)
        tl.store(A + block * 4096 + square, a.to(A.dtype.element_ty))
        tl.store(P + block * 4096 + square, (qk * D).to(P.dtype.element_ty))


@triton.jit
def _block(A, bi, bj):
    i = tl.arange(0, 16)
    return tl.load(A + (bi * 16 + i[:, None]) * 64 + bj * 16 + i[None, :]).to(tl.float32)


@triton.jit
def _put(M, bi, bj, x):
    i = tl.arange(0, 16)
    where = M + (bi * 16 + i[:, None]) * 64 + bj * 16 + i[None, :]
    tl.store(where, x.to(M.dtype.element_ty))


@triton.jit
def _next_row(m, row, r):
    """Row r of the inverse of a unit lower block, from the rows above it."""
    a = tl.sum(tl.where(row == r, m, 0.0), 0)
    a += tl.sum(a[:, None] * m, 0)
    return tl.where(row == r, a[None, :], m)


@triton.jit
def _invert(A, M, chunk_sequence, HV: tl.constexpr, PRECISION: tl.constexpr):
    """M = (I + A)^-1 of one chunk and value head: four 16-blocks by rows, the rest by products."""
    chunk = tl.program_id(0)
    if tl.load(chunk_sequence + chunk) < 0:
        return
    block = (chunk * HV + tl.program_id(1)).to(tl.int64)
    A += block * 4096
    M += block * 4096
    i = tl.arange(0, 16)
    row = i[:, None] + tl.zeros((1, 16), tl.int32)
    unit = (i[:, None] == i[None, :]).to(tl.float32)
    m1 = -_block(A, 0, 0)
    m2 = -_block(A, 1, 1)
    m3 = -_block(A, 2, 2)
    m4 = -_block(A, 3, 3)
    for r in range(2, 16):
        m1 = _next_row(m1, row, r)
        m2 = _next_row(m2, row, r)
        m3 = _next_row(m3, row, r)
        m4 = _next_row(m4, row, r)
    m1 += unit
    m2 += unit
    m3 += unit
    m4 += unit
    a21 = _block(A, 1, 0)
    a32 = _block(A, 2, 1)
    a43 = _block(A, 3, 2)
    m21 = -tl.dot(tl.dot(m2, a21, input_precision=PRECISION), m1, input_precision=PRECISION)
    m32 = -tl.dot(tl.dot(m3, a32, input_precision=PRECISION), m2, input_precision=PRECISION)
    m43 = -tl.dot(tl.dot(m4, a43, input_precision=PRECISION), m3, input_precision=PRECISION)
    a31 = _block(A, 2, 0)
    a42 = _block(A, 3, 1)
    x = tl.dot(a31, m1, input_precision=PRECISION) + tl.dot(a32, m21, input_precision=PRECISION)
    m31 = -tl.dot(m3, x, input_precision=PRECISION)
    x = tl.dot(a42, m2, input_precision=PRECISION) + tl.dot(a43, m32, input_precision=PRECISION)
    m42 = -tl.dot(m4, x, input_precision=PRECISION)
    x = tl.dot(_block(A, 3, 0), m1, input_precision=PRECISION)
    x += tl.dot(a42, m21, input_precision=PRECISION)
    x += tl.dot(a43, m31, input_precision=PRECISION)
    m41 = -tl.dot(m4, x, input_precision=PRECISION)
    zero = tl.zeros((16, 16), tl.float32)
    _put(M, 0, 0, m1)
    _put(M, 0, 1, zero)
    _put(M, 0, 2, zero)
    _put(M, 0, 3, zero)
    _put(M, 1, 0, m21)
    _put(M, 1, 1, m2)
    _put(M, 1, 2, zero)
    _put(M, 1, 3, zero)
    _put(M, 2, 0, m31)
    _put(M, 2, 1, m32)
    _put(M, 2, 2, m3)
    _put(M, 2, 3, zero)
    _put(M, 3, 0, m41)
    _put(M, 3, 1, m42)
    _put(M, 3, 2, m43)
    _put(M, 3, 3, m4)


@triton.jit
def _states(
    q, k, v, gates, M, P, o, initial, final, kept_states, kept_values,
    cu_seqlens, chunk_first, sq, sk, sv,
    RATIO: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    INITIAL: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One sequence, value head and tile of BV value columns: all chunks, one after the other.

    With ``KEEP`` the state before each chunk and V' are stored for the backward instead of o.
    """
    pid = tl.program_id(0)
    tile = pid % (DV // BV)
    h = pid // (DV // BV) % HV
    n = (pid // (DV // BV * HV)).to(tl.int64)
    bos = tl.load(cu_seqlens + n).to(tl.int64)
    length = (tl.load(cu_seqlens + n + 1) - bos).to(tl.int32)
    first = tl.load(chunk_first + n).to(tl.int64)
    i = tl.arange(0, 64)
    d = tl.arange(0, DK)
    e = tile * BV + tl.arange(0, BV)
    hk = h // RATIO
    k += bos * sk + hk * DK
    q += bos * sq + hk * DK
    v += bos * sv + h * DV
    o += (bos * HV + h) * DV
    kept_values += (bos * HV + h) * DV
    gates += h * 128
    M += h * 4096
    P += h * 4096
    kept_states += h * DK * DV
    corner = (n * HV + h) * DK * DV
    inside = d[:, None] * DV + e[None, :]
    square = i[:, None] * 64 + i[None, :]
    if INITIAL:
        S = tl.load(initial + corner + inside).to(tl.float32)
    else:
        S = tl.zeros((DK, BV), tl.float32)
    for c in tl.range(0, (length + 63) // 64, num_stages=STAGES):
        row = c * 64 + i
        live = (row < length)[:, None]
        at = row.to(tl.int64)[:, None]
        slot = (first + c) * HV
        kt = tl.load(k + at * sk + d[None, :], mask=live, other=0.0)
        vt = tl.load(v + at * sv + e[None, :], mask=live, other=0.0)
        mt = tl.load(M + slot * 4096 + square)
        G = tl.load(gates + slot * 128 + i)
        bt = tl.load(gates + slot * 128 + 64 + i)
        last = tl.load(gates + slot * 128 + 63)
        Sb = S.to(kt.dtype)
        y = tl.dot(kt, Sb, input_precision=PRECISION)
        grown = tl.exp(G)[:, None]
        x = (vt.to(tl.float32) - grown * y) * bt[:, None]
        if KEEP:
            tl.store(kept_states + slot * DK * DV + inside, Sb)
        else:
            qt = tl.load(q + at * sq + d[None, :], mask=live, other=0.0)
            out = tl.dot(qt, Sb, input_precision=PRECISION) * grown
        w = tl.dot(mt, x.to(kt.dtype), input_precision=PRECISION)
        wb = w.to(kt.dtype)
        left = (w * tl.exp(last - G)[:, None]).to(kt.dtype)
        S = S * tl.exp(last)
        S = tl.dot(tl.trans(kt), left, S, input_precision=PRECISION)
        if KEEP:
            tl.store(kept_values + at * (HV * DV) + e[None, :], wb, mask=live)
        else:
            pt = tl.load(P + slot * 4096 + square)
            out = tl.dot(pt, wb, out, input_precision=PRECISION)
            tl.store(o + at * (HV * DV) + e[None, :], out.to(o.dtype.element_ty), mask=live)
    tl.store(final + corner + inside, S)


@dataclass(frozen=True)
class Prepared:
    """What both passes need: the chunk index, gates, M and P (see the kernels)."""

    chunks: int  # upper bound known on the host
    chunk_sequence: Tensor
    chunk_first: Tensor
    gates: Tensor
    M: Tensor
    P: Tensor


def precision(dtype: torch.dtype) -> str:
    """fp32 inputs take three tf32 products (error 1e-6); for 16-bit ones one is exact enough."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def rows(x: Tensor) -> Tensor:
    """``x`` (T, H, d) with heads and channels contiguous; only the token stride is free."""
    if x.stride(2) == 1 and x.stride(1) == x.shape[2] and x.stride(0) % 8 == 0:
        return x
    return x.contiguous()


def index_chunks(cu_seqlens: Tensor, tokens: int, block: int = 64) -> tuple[int, Tensor, Tensor]:
    """(bound on the number of 64-token chunks, sequence of each or -1, first chunk of each)."""
    sequences = len(cu_seqlens) - 1
    chunks = tokens // block + sequences
    chunk_sequence = torch.empty(chunks, dtype=torch.int32, device=cu_seqlens.device)
    chunk_first = torch.empty(sequences, dtype=torch.int32, device=cu_seqlens.device)
    _index[(sequences,)](cu_seqlens, chunk_sequence, chunk_first, sequences, chunks, BLOCK=256)
    return chunks, chunk_sequence, chunk_first


def prepare(q: Tensor, k: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor) -> Prepared:
    """Everything that does not depend on the state; all chunks at once."""
    tokens, key_heads, dk = k.shape
    heads = g.shape[1]
    chunks, chunk_sequence, chunk_first = index_chunks(cu_seqlens, tokens)
    gates = torch.empty(chunks, heads, 2, CHUNK, dtype=torch.float32, device=k.device)
    # fp16 has the mantissa of tf32 and |A| <= 1
    full = k.dtype == torch.float32
    A = torch.empty(
        chunks, heads, CHUNK, CHUNK, dtype=k.dtype if full else torch.float16, device=k.device
    )
    M = torch.empty(chunks, heads, CHUNK, CHUNK, dtype=k.dtype, device=k.device)
    P = torch.empty_like(M)
    _scores[(chunks, key_heads)](
        q, k, g, beta, gates, A, P, cu_seqlens, chunk_sequence, chunk_first,
        q.stride(0), k.stride(0), RATIO=heads // key_heads, HV=heads, DK=dk,
        PRECISION=precision(k.dtype), num_warps=4, num_stages=1,
    )  # fmt: skip
    _invert[(chunks, heads)](
        A, M, chunk_sequence, HV=heads, PRECISION=precision(k.dtype), num_warps=1, num_stages=1
    )
    return Prepared(chunks, chunk_sequence, chunk_first, gates, M, P)


def warps(dtype: torch.dtype) -> int:
    """Two for fp32: wgmma cannot transpose 32-bit tiles in shared memory, mma.sync need not."""
    return 2 if dtype == torch.float32 else 4


def state_config(
    sequences: int, heads: int, dk: int, dv: int, dtype: torch.dtype
) -> tuple[int, int, int]:
    """(value columns per program, warps, stages) of the serial kernels."""
    if dtype == torch.float32:
        return 16, warps(dtype), 1
    wide = STATE_CONFIGS["many"]
    name = "many" if sequences * heads * (dv // min(dv, wide[0])) >= WIDE_FROM else "few"
    width, count, stages = STATE_CONFIGS[name]
    if dk > 128:
        width, stages = 32, 2
    return min(width, dv), count, stages


def run_states(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prepared: Prepared,
    cu_seqlens: Tensor,
    initial: Tensor | None,
    *,
    keep: bool = False,
    config: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final, None-like) or, with ``keep``, (states before each chunk, final, V')."""
    tokens, key_heads, dk = k.shape
    heads, dv = v.shape[1:]
    sequences = len(cu_seqlens) - 1
    width, count, stages = config or state_config(sequences, heads, dk, dv, k.dtype)
    final = torch.empty(sequences, heads, dk, dv, dtype=torch.float32, device=v.device)
    values = torch.empty(tokens, heads, dv, dtype=v.dtype, device=v.device)
    states = final
    if keep:
        states = torch.empty(prepared.chunks, heads, dk, dv, dtype=k.dtype, device=v.device)
    _states[(sequences * heads * (dv // width),)](
        q, k, v, prepared.gates, prepared.M, prepared.P, values, final if initial is None
        else initial, final, states, values, cu_seqlens, prepared.chunk_first,
        q.stride(0), k.stride(0), v.stride(0),
        RATIO=heads // key_heads, HV=heads, DK=dk, DV=dv, BV=width, INITIAL=initial is not None,
        KEEP=keep, PRECISION=precision(k.dtype), STAGES=stages, num_warps=count,
        num_stages=stages,
    )  # fmt: skip
    return (states, final, values) if keep else (values, final, values)


class ChunkGatedDeltaRule(torch.autograd.Function):
    """Forward keeps its inputs only; the backward makes M, P, the states and V' again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        cu_seqlens: Tensor,
        initial: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See :func:`chunk_gated_delta_rule`."""
        prepared = prepare(q, k, g, beta, cu_seqlens)
        o, final, _ = run_states(q, k, v, prepared, cu_seqlens, initial)
        ctx.save_for_backward(q, k, v, g, beta, cu_seqlens, initial)  # type: ignore[arg-type]
        return o, final

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, d_o: Tensor, d_final: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, g, beta and the initial state."""
        from qnext.kernels.gated_delta import triton_chunk_grad

        q, k, v, g, beta, cu_seqlens, initial = ctx.saved_tensors  # type: ignore[attr-defined]
        dq, dk, dv, dg, dbeta, d_initial = triton_chunk_grad.gradients(
            q, k, v, g, beta, cu_seqlens, initial, d_o, d_final
        )
        return dq, dk, dv, dg, dbeta, None, d_initial if initial is not None else None


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The contract of ``qnext.kernels.gated_delta``; head sizes are powers of two, 16 to 256."""
    if len(v) == 0:
        shape = (len(cu_seqlens) - 1, v.shape[1], k.shape[2], v.shape[2])
        start = v.new_zeros(shape, dtype=torch.float32)
        return v.new_empty(v.shape), start if initial_state is None else initial_state.float()
    dtype = v.dtype
    q, k, v = rows(q.to(dtype)), rows(k.to(dtype)), rows(v)
    initial = None if initial_state is None else initial_state.float().contiguous()
    gates = g.float().contiguous(), beta.float().contiguous()
    o, final = ChunkGatedDeltaRule.apply(q, k, v, *gates, cu_seqlens, initial)
    return o, final
