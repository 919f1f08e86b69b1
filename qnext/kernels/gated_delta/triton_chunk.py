"""Chunked gated delta rule in Triton, forward: two launches (spec 4.5, arXiv 2412.06464).

``_scores`` makes P and M = (I + A)^-1 of every chunk and value head; ``_states`` walks the chunks
of one sequence serially for one tile of value columns and writes the outputs as it goes. W and U
of the paper are never stored: V' = M (beta (V - e^G K S)), so one chunk reads K, Q, V, M, P once
and writes O.
The backward is in ``triton_chunk_grad.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64

#: (value columns per program, warps, stages) of the serial kernels, measured on an H200. Columns
#: are the rows of their products: 64 fills a warpgroup, 32 gives one long sequence twice the
#: programs.
STATE_CONFIGS = {
    "few": (32, 4, 2),
    "many": (64, 4, 2),
}
#: Programs from which two to a multiprocessor are better (132 on H100 and H200).
MANY_FROM = 133


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
def _double(inverse, A, r, c, level, PRECISION: tl.constexpr):
    """The inverse of I + A within blocks of 2**(level + 1), from that within blocks of half."""
    # r > c where A is not zero, so the blocks of r and c are an odd one and that before it
    between = ((r >> level) != (c >> level)) & ((r >> (level + 1)) == (c >> (level + 1)))
    X = tl.where(between, A, 0.0).to(A.dtype)
    rounded = inverse.to(A.dtype)
    corner = tl.dot(X, rounded, input_precision=PRECISION).to(A.dtype)
    return inverse - tl.dot(rounded, corner, input_precision=PRECISION)


@triton.jit
def _scores(
    q, k, g, beta, gates, M, P, cu_seqlens, chunk_sequence, chunk_first, sq, sk,
    RATIO: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per chunk and value head: P = lower(Q K^T D), M = (I + A)^-1, A = lower(beta K K^T D).

    ``gates`` (chunks, Hv, 4, 64) is G, beta, e^G and e^(Gn - G). The inverse grows by doubling its
    diagonal blocks b to 2b, all at once: with X the part of A between two neighbouring blocks the
    new corner is -M X M. That is substitution by blocks, so close keys do not make it unstable as
    they do a power series; and it needs no piece of a tile, which Triton cannot cut out.
    """
    h = tl.program_id(0)
    chunk = tl.program_id(1)
    n = tl.load(chunk_sequence + chunk)
    if n < 0:
        return
    bos = tl.load(cu_seqlens + n)
    eos = tl.load(cu_seqlens + n + 1)
    i = tl.arange(0, 64)
    d = tl.arange(0, DK)
    row = bos + (chunk - tl.load(chunk_first + n)) * 64 + i
    live = row < eos
    at = row.to(tl.int64)[:, None]
    hk = h // RATIO
    block = (chunk * HV + h).to(tl.int64)
    gt = tl.load(g + row.to(tl.int64) * HV + h, mask=live, other=0.0)
    bt = tl.load(beta + row.to(tl.int64) * HV + h, mask=live, other=0.0)
    kt = tl.load(k + at * sk + hk * DK + d[None, :], mask=live[:, None], other=0.0)
    qt = tl.load(q + at * sq + hk * DK + d[None, :], mask=live[:, None], other=0.0)
    G = tl.cumsum(gt, 0)
    tl.store(gates + block * 256 + i, G)
    tl.store(gates + block * 256 + 64 + i, bt)
    tl.store(gates + block * 256 + 128 + i, tl.exp(G))
    tl.store(gates + block * 256 + 192 + i, tl.exp(tl.sum(gt, 0) - G))
    r = i[:, None]
    c = i[None, :]
    D = tl.exp(tl.where(r >= c, G[:, None] - G[None, :], float("-inf")))
    qk = tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
    tl.store(P + block * 4096 + r * 64 + c, (qk * D).to(P.dtype.element_ty))
    kk = tl.dot(kt, tl.trans(kt), input_precision=PRECISION)
    A = tl.where(r > c, kk * D * bt[:, None], 0.0)
    if kt.dtype != tl.float32:
        A = A.to(tl.float16)  # the mantissa of tf32; |A| <= 1
    inverse = tl.where(r == c, 1.0, tl.where(r // 2 == c // 2, -A.to(tl.float32), 0.0))
    if kt.dtype == tl.float32:  # code of three products per product: not five times over
        for level in range(1, 6):
            inverse = _double(inverse, A, r, c, level, PRECISION)
    else:
        for level in tl.static_range(1, 6):
            inverse = _double(inverse, A, r, c, level, PRECISION)
    tl.store(M + block * 4096 + r * 64 + c, inverse.to(M.dtype.element_ty))


@triton.jit
def _states(
    q, k, v, gates, M, P, o, initial, final, kept_states, kept_values,
    cu_seqlens, chunk_first, sq, sk, sv,
    RATIO: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    INITIAL: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One sequence, value head and tile of BV value columns: all chunks, one after the other.

    Everything is turned, values by keys or tokens: the computed tile is then the left operand of
    each product and stays in registers, and what lies in shared memory are the loaded tiles.
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
    gates += h * 256
    M += h * 4096
    P += h * 4096
    kept_states += h * DK * DV
    corner = (n * HV + h) * DK * DV
    inside = d[None, :] * DV + e[:, None]
    square = i[:, None] * 64 + i[None, :]
    # 32-bit within a chunk: the 64-bit part of an address is one scalar
    k_tile = i[:, None] * sk + d[None, :]
    q_tile = i[:, None] * sq + d[None, :]
    v_tile = i[:, None] * sv + e[None, :]
    o_tile = i[None, :] * (HV * DV) + e[:, None]
    if INITIAL:
        S = tl.load(initial + corner + inside).to(tl.float32)
    else:
        S = tl.zeros((BV, DK), tl.float32)
    for c in tl.range(0, (length + 63) // 64, num_stages=STAGES):
        live = c * 64 + i < length
        at = tl.full((), 64, tl.int64) * c
        slot = (first + c) * HV
        kt = tl.load(k + at * sk + k_tile, mask=live[:, None], other=0.0)
        vt = tl.load(v + at * sv + v_tile, mask=live[:, None], other=0.0)
        mt = tl.load(M + slot * 4096 + square)
        bt = tl.load(gates + slot * 256 + 64 + i)
        grown = tl.load(gates + slot * 256 + 128 + i)
        fading = tl.load(gates + slot * 256 + 192 + i)
        decay = tl.load(gates + slot * 256 + 128 + 63)
        Sb = S.to(kt.dtype)
        y = tl.dot(Sb, tl.trans(kt), input_precision=PRECISION)
        x = (tl.trans(vt).to(tl.float32) - y * grown[None, :]) * bt[None, :]
        if KEEP:
            tl.store(kept_states + slot * DK * DV + inside, Sb)
        w = tl.dot(x.to(kt.dtype), tl.trans(mt), input_precision=PRECISION)
        wb = w.to(kt.dtype)
        left = (w * fading[None, :]).to(kt.dtype)
        S = tl.dot(left, kt, S * decay, input_precision=PRECISION)
        if KEEP:
            tl.store(kept_values + at * (HV * DV) + o_tile, wb, mask=live[None, :])
        else:
            qt = tl.load(q + at * sq + q_tile, mask=live[:, None], other=0.0)
            out = tl.dot(Sb, tl.trans(qt), input_precision=PRECISION) * grown[None, :]
            pt = tl.load(P + slot * 4096 + square)
            out = tl.dot(wb, tl.trans(pt), out, input_precision=PRECISION)
            tl.store(o + at * (HV * DV) + o_tile, out.to(o.dtype.element_ty), mask=live[None, :])
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
    gates = torch.empty(chunks, heads, 4, CHUNK, dtype=torch.float32, device=k.device)
    M = torch.empty(chunks, heads, CHUNK, CHUNK, dtype=k.dtype, device=k.device)
    P = torch.empty_like(M)
    _scores[(heads, chunks)](
        q, k, g, beta, gates, M, P, cu_seqlens, chunk_sequence, chunk_first, q.stride(0),
        k.stride(0), RATIO=heads // key_heads, HV=heads, DK=dk, PRECISION=precision(k.dtype),
        num_warps=warps(k.dtype), num_stages=1,
    )  # fmt: skip
    return Prepared(chunks, chunk_sequence, chunk_first, gates, M, P)


def warps(dtype: torch.dtype) -> int:
    """Two for fp32: wgmma cannot transpose 32-bit tiles in shared memory, mma.sync need not."""
    return 2 if dtype == torch.float32 else 4


def state_config(
    sequences: int,
    heads: int,
    dk: int,
    dv: int,
    dtype: torch.dtype,
    configs: dict[str, tuple[int, int, int]] = STATE_CONFIGS,
) -> tuple[int, int, int]:
    """(value columns per program, warps, stages) of the serial kernels."""
    if dtype == torch.float32:
        return 16, warps(dtype), 1
    width = min(configs["few"][0], dv)
    name = "many" if sequences * heads * (dv // width) >= MANY_FROM else "few"
    width, count, stages = configs[name]
    if dk > 128:
        count, stages = 8, 2
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


def is_hopper_prefill(q: Tensor, v: Tensor, cu_seqlens: Tensor) -> bool:
    """Whether ``gluon_chunk`` does it better: one long sequence, no gradients, heads of 128.

    Measured on an H200: 1.06 instead of 1.49 ms for 1 x 32,768 tokens, but 0.97 instead of 0.82
    for 4 x 8,192.
    """
    wide = q.shape[-1] == v.shape[-1] == 128 and v.dtype in (torch.bfloat16, torch.float16)
    grads = torch.is_grad_enabled() and (q.requires_grad or v.requires_grad)
    long = len(cu_seqlens) == 2 and len(v) >= 2048
    return wide and long and not grads and torch.cuda.get_device_capability(v.device)[0] == 9


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
