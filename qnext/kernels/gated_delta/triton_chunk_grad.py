"""Backward of the chunked gated delta rule in Triton.

With V' = M X, X = beta (V - e^G K S), the incoming state gradient dS' and dX = M^T dV':

    dV' = P^T dO + e^(Gn - G) K dS'        dA = -dX V'^T        dP = dO V'^T
    dS  = e^Gn dS' + Q^T e^G dO - K^T beta e^G dX

``_state_grads`` walks the chunks backwards (dX, dS'); ``_score_grads`` makes the 64 x 64 products;
``_input_grads`` sums everything that meets q and k; ``_gate_grads`` turns dG into dg. The gradient
of G never needs a sum over a 64 x 64 block: it is q.dq + k.(rising part of dk) - k.(falling part).
No computed tile is ever transposed in registers: Triton 3.4 to 3.7.0 miscompiles that on Hopper
(flash-linear-attention issue 640), so the transposed operands are always loaded ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext.kernels.gated_delta import triton_chunk
from qnext.kernels.gated_delta.triton_chunk import CHUNK, precision

#: (key columns, value columns, warps, stages) of the parallel gradient kernel.
INPUT_CONFIG = (32, 64, 4, 2)
#: As in ``triton_chunk``; narrower tiles spill here.
STATE_CONFIGS = {"few": (64, 4, 2), "many": (64, 4, 2)}


@triton.jit
def _state_grads(
    q, k, gates, M, P, d_o, d_final, d_x, d_states, d_initial, cu_seqlens, chunk_first, sq, sk,
    RATIO: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The serial part, last chunk first: dX of each token, dS' of each chunk, dS of the start.

    Turned like ``_states``.
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
    d_o += (bos * HV + h) * DV
    d_x += (bos * HV + h) * DV
    gates += h * 256
    M += h * 4096
    P += h * 4096
    d_states += h * DK * DV
    corner = (n * HV + h) * DK * DV
    inside = d[None, :] * DV + e[:, None]
    square = i[:, None] * 64 + i[None, :]
    k_tile = i[:, None] * sk + d[None, :]
    q_tile = i[:, None] * sq + d[None, :]
    o_tile = i[None, :] * (HV * DV) + e[:, None]
    dS = tl.load(d_final + corner + inside)
    count = (length + 63) // 64
    for step in tl.range(0, count, num_stages=STAGES):
        c = count - 1 - step
        live = c * 64 + i < length
        at = tl.full((), 64, tl.int64) * c
        slot = (first + c) * HV
        kt = tl.load(k + at * sk + k_tile, mask=live[:, None], other=0.0)
        qt = tl.load(q + at * sq + q_tile, mask=live[:, None], other=0.0)
        dot = tl.load(d_o + at * (HV * DV) + o_tile, mask=live[None, :], other=0.0)
        mt = tl.load(M + slot * 4096 + square)
        pt = tl.load(P + slot * 4096 + square)
        bt = tl.load(gates + slot * 256 + 64 + i)
        grown = tl.load(gates + slot * 256 + 128 + i)
        fading = tl.load(gates + slot * 256 + 192 + i)
        decay = tl.load(gates + slot * 256 + 128 + 63)
        dSb = dS.to(kt.dtype)
        tl.store(d_states + slot * DK * DV + inside, dSb)
        dw = tl.dot(dSb, tl.trans(kt), input_precision=PRECISION) * fading[None, :]
        dw = tl.dot(dot, pt, dw, input_precision=PRECISION)
        dx = tl.dot(dw.to(kt.dtype), mt, input_precision=PRECISION)
        tl.store(d_x + at * (HV * DV) + o_tile, dx.to(kt.dtype), mask=live[None, :])
        out = (dot.to(tl.float32) * grown[None, :]).to(kt.dtype)
        back = (dx * (-bt * grown)[None, :]).to(kt.dtype)
        dS = tl.dot(out, qt, dS * decay, input_precision=PRECISION)
        dS = tl.dot(back, kt, dS, input_precision=PRECISION)
    tl.store(d_initial + corner + inside, dS)


@triton.jit
def _score_grads(
    v, gates, d_o, d_x, values, F, E, d_v, d_beta, cu_seqlens, chunk_sequence, chunk_first, sv,
    HV: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F = (dO V'^T) D, E = -(dX V'^T) D strictly lower, dv = beta dX, and v's part of dbeta."""
    chunk = tl.program_id(0)
    h = tl.program_id(1)
    n = tl.load(chunk_sequence + chunk)
    if n < 0:
        return
    bos = tl.load(cu_seqlens + n)
    eos = tl.load(cu_seqlens + n + 1)
    i = tl.arange(0, 64)
    e = tl.arange(0, DV)
    row = bos + (chunk - tl.load(chunk_first + n)) * 64 + i
    live = (row < eos)[:, None]
    at = row.to(tl.int64)[:, None]
    block = (chunk * HV + h).to(tl.int64)
    G = tl.load(gates + block * 256 + i)
    bt = tl.load(gates + block * 256 + 64 + i)
    tile = at * (HV * DV) + h * DV + e[None, :]
    w = tl.load(values + tile, mask=live, other=0.0)
    dot = tl.load(d_o + tile, mask=live, other=0.0)
    f = tl.dot(dot, tl.trans(w), input_precision=PRECISION)
    dxt = tl.load(d_x + tile, mask=live, other=0.0)
    a = tl.dot(dxt, tl.trans(w), input_precision=PRECISION)
    gap = tl.where(i[:, None] >= i[None, :], G[:, None] - G[None, :], float("-inf"))
    D = tl.exp(gap)
    square = block * 4096 + i[:, None] * 64 + i[None, :]
    tl.store(F + square, (f * D).to(F.dtype.element_ty))
    tl.store(E + square, tl.where(i[:, None] > i[None, :], -a * D, 0.0).to(E.dtype.element_ty))
    dx32 = dxt.to(tl.float32)
    vt = tl.load(v + at * sv + h * DV + e[None, :], mask=live, other=0.0).to(tl.float32)
    tl.store(d_v + tile, (dx32 * bt[:, None]).to(d_v.dtype.element_ty), mask=live)
    tl.store(d_beta + block * 64 + i, tl.sum(dx32 * vt, 1))


@triton.jit
def _input_grads(
    q, k, gates, states, d_states, d_o, d_x, values, F, E, d_q, d_k, d_gates, d_last,
    cu_seqlens, chunk_sequence, chunk_first, sq, sk, chunks,
    RATIO: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dq and dk of one chunk, key head and tile of BK key columns; that tile's part of dG, dbeta.

    ``d_gates`` is (key tiles, chunks, Hv, 2, 64); ``d_last`` (key tiles, chunks, Hv) is the part
    of dG that belongs to the last token of the chunk.
    """
    part = tl.program_id(0)
    chunk = tl.program_id(1)
    hk = tl.program_id(2)
    n = tl.load(chunk_sequence + chunk)
    if n < 0:
        return
    bos = tl.load(cu_seqlens + n)
    eos = tl.load(cu_seqlens + n + 1)
    i = tl.arange(0, 64)
    d = part * BK + tl.arange(0, BK)
    e = tl.arange(0, BV)
    row = bos + (chunk - tl.load(chunk_first + n)) * 64 + i
    live = (row < eos)[:, None]
    at = row.to(tl.int64)[:, None]
    square = i[:, None] * 64 + i[None, :]
    kt = tl.load(k + at * sk + hk * DK + d[None, :], mask=live, other=0.0)
    qt = tl.load(q + at * sq + hk * DK + d[None, :], mask=live, other=0.0)
    k32 = kt.to(tl.float32)
    dq = tl.zeros((64, BK), tl.float32)
    dk = tl.zeros((64, BK), tl.float32)
    for r in range(RATIO):
        h = hk * RATIO + r
        block = (chunk * HV + h).to(tl.int64)
        G = tl.load(gates + block * 256 + i)
        bt = tl.load(gates + block * 256 + 64 + i)
        last = tl.load(gates + block * 256 + 63)
        from_o = tl.zeros((64, BK), tl.float32)
        from_x = tl.zeros((64, BK), tl.float32)
        from_next = tl.zeros((64, BK), tl.float32)
        kept = tl.zeros((BK,), tl.float32)
        for start in range(0, DV, BV):
            tile = at * (HV * DV) + h * DV + start + e[None, :]
            corner = block * DK * DV + d[:, None] * DV + start + e[None, :]
            s = tl.load(states + corner)
            ds = tl.load(d_states + corner)
            dot = tl.load(d_o + tile, mask=live, other=0.0)
            dxt = tl.load(d_x + tile, mask=live, other=0.0)
            w = tl.load(values + tile, mask=live, other=0.0)
            from_o = tl.dot(dot, tl.trans(s), from_o, input_precision=PRECISION)
            from_x = tl.dot(dxt, tl.trans(s), from_x, input_precision=PRECISION)
            from_next = tl.dot(w, tl.trans(ds), from_next, input_precision=PRECISION)
            kept += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 1)
        f = tl.load(F + block * 4096 + square)
        x = tl.load(E + block * 4096 + square)
        grown = tl.exp(G)[:, None]
        dqh = tl.dot(f, kt, from_o * grown, input_precision=PRECISION)
        rising = tl.dot(x, kt, -from_x * grown, input_precision=PRECISION)
        from_next = from_next * tl.exp(last - G)[:, None]
        after = tl.sum(tl.sum(k32 * from_next, 1), 0) + tl.exp(last) * tl.sum(kept, 0)
        kb = (k32 * bt[:, None]).to(kt.dtype)
        falling = tl.dot(tl.trans(f), qt, from_next, input_precision=PRECISION)
        falling = tl.dot(tl.trans(x), kb, falling, input_precision=PRECISION)
        dbeta = tl.sum(k32 * rising, 1)
        dG = tl.sum(qt.to(tl.float32) * dqh, 1) + dbeta * bt - tl.sum(k32 * falling, 1)
        dq += dqh
        dk += rising * bt[:, None] + falling
        out = (part * chunks + chunk).to(tl.int64) * HV + h
        tl.store(d_gates + out * 128 + i, dG)
        tl.store(d_gates + out * 128 + 64 + i, dbeta)
        tl.store(d_last + out, after)
    width = tl.num_programs(2) * DK
    where = at * width + hk * DK + d[None, :]
    tl.store(d_q + where, dq.to(d_q.dtype.element_ty), mask=live)
    tl.store(d_k + where, dk.to(d_k.dtype.element_ty), mask=live)


@triton.jit
def _gate_grads(
    d_gates, d_last, v_beta, d_g, d_beta, cu_seqlens, chunk_sequence, chunk_first, chunks,
    HV: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Sum the parts; dg is the sum of dG over the rest of the chunk."""
    chunk = tl.program_id(0)
    h = tl.program_id(1)
    n = tl.load(chunk_sequence + chunk)
    if n < 0:
        return
    bos = tl.load(cu_seqlens + n)
    eos = tl.load(cu_seqlens + n + 1)
    i = tl.arange(0, 64)
    row = bos + (chunk - tl.load(chunk_first + n)) * 64 + i
    dG = tl.zeros((64,), tl.float32)
    db = tl.load(v_beta + (chunk * HV + h).to(tl.int64) * 64 + i)
    after = 0.0
    for part in range(PARTS):
        at = (part * chunks + chunk).to(tl.int64) * HV + h
        dG += tl.load(d_gates + at * 128 + i)
        db += tl.load(d_gates + at * 128 + 64 + i)
        after += tl.load(d_last + at)
    dg = after + tl.sum(dG, 0) - tl.cumsum(dG, 0) + dG
    where = row.to(tl.int64) * HV + h
    tl.store(d_g + where, dg, mask=row < eos)
    tl.store(d_beta + where, db, mask=row < eos)


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial: Tensor | None,
    d_o: Tensor,
    d_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dg, dbeta, d_initial) of ``chunk_gated_delta_rule``."""
    _, key_heads, dk = k.shape
    heads, dv = v.shape[1:]
    sequences = len(cu_seqlens) - 1
    made = triton_chunk.prepare(q, k, g, beta, cu_seqlens)
    states, _, values = triton_chunk.run_states(q, k, v, made, cu_seqlens, initial, keep=True)
    d_o = d_o.to(v.dtype).contiguous()
    d_final = d_final.float().contiguous()
    exact = precision(k.dtype)
    seq_index = cu_seqlens, made.chunk_sequence, made.chunk_first

    d_x, d_states = torch.empty_like(values), torch.empty_like(states)
    d_initial = torch.empty_like(d_final)
    width, warps, stages = triton_chunk.state_config(
        sequences, heads, dk, dv, k.dtype, STATE_CONFIGS
    )
    _state_grads[(sequences * heads * (dv // width),)](
        q, k, made.gates, made.M, made.P, d_o, d_final, d_x, d_states, d_initial, cu_seqlens,
        made.chunk_first, q.stride(0), k.stride(0), RATIO=heads // key_heads, HV=heads, DK=dk,
        DV=dv, BV=width, PRECISION=exact, STAGES=stages, num_warps=warps, num_stages=stages,
    )  # fmt: skip

    F, E = torch.empty_like(made.P), made.M  # M is not needed any more
    d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    v_beta = torch.empty(made.chunks, heads, CHUNK, dtype=torch.float32, device=v.device)
    _score_grads[(made.chunks, heads)](
        v, made.gates, d_o, d_x, values, F, E, d_v, v_beta, *seq_index, v.stride(0),
        HV=heads, DV=dv, PRECISION=exact, num_warps=4, num_stages=1,
    )  # fmt: skip

    bk, bv, warps, stages = INPUT_CONFIG
    if k.dtype == torch.float32:
        bk, bv, warps, stages = 16, 16, triton_chunk.warps(k.dtype), 1
    bk, bv = min(bk, dk), min(bv, dv)
    parts = dk // bk
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_k = torch.empty_like(d_q)
    d_gates = torch.empty(parts, made.chunks, heads, 2, CHUNK, dtype=torch.float32, device=v.device)
    d_last = torch.empty(parts, made.chunks, heads, dtype=torch.float32, device=v.device)
    _input_grads[(parts, made.chunks, key_heads)](
        q, k, made.gates, states, d_states, d_o, d_x, values, F, E, d_q, d_k, d_gates, d_last,
        *seq_index, q.stride(0), k.stride(0), made.chunks, RATIO=heads // key_heads, HV=heads,
        DK=dk, DV=dv, BK=bk, BV=bv, PRECISION=exact, num_warps=warps, num_stages=stages,
    )  # fmt: skip

    d_g, d_beta = torch.empty_like(g), torch.empty_like(beta)
    _gate_grads[(made.chunks, heads)](
        d_gates, d_last, v_beta, d_g, d_beta, *seq_index, made.chunks, HV=heads, PARTS=parts,
        num_warps=1,
    )  # fmt: skip
    return d_q, d_k, d_v, d_g, d_beta, d_initial
