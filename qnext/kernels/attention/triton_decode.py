"""Triton attention of 1..9 new tokens per sequence over a paged cache: split KV, packed heads.

Two launches. ``_split`` normalises and rotates the queries (every program its own copy, they are
small), writes the new keys and values to the cache where its part of the sequence holds them, and
attends, following the block table: all query heads of one KV head and all new tokens are the rows
of one ``tl.dot``, so K and V are read once. ``_merge`` joins the parts by their log-sum-exp and
applies the output gate.
Spec section 3: head layout [query | gate], zero-centred q/k norm, rotation of the first channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qnext.kernels.norm.triton_quantise import quantise

MAX_NEW_TOKENS = 9
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _norm_rotate(pointer, live, norm, rotary, eps, D: tl.constexpr, ROT: tl.constexpr):
    """RMSNorm (1 + w) and half-split rotation of rows: pointer, live, rotary are [M, 1]."""
    d = tl.arange(0, D)[None, :]
    half: tl.constexpr = ROT // 2
    inside = d < ROT
    partner = tl.where(inside, tl.where(d < half, d + half, d - half), d)
    x = tl.load(pointer + d, mask=live, other=0.0).to(tl.float32)
    other = tl.load(pointer + partner, mask=live, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
    x *= rstd * (1.0 + tl.load(norm + d).to(tl.float32))
    other *= rstd * (1.0 + tl.load(norm + partner).to(tl.float32))
    turn = live & inside
    cos = tl.load(rotary + d % half, mask=turn, other=1.0)
    sin = tl.load(rotary + half + d % half, mask=turn, other=0.0)
    return x * cos + tl.where(d < half, -other, other) * sin


@triton.jit
def _cells(table, t, block_size, token_stride, BT: tl.constexpr, WHOLE: tl.constexpr):
    """Offset of the cache rows of positions t.. (t a multiple of BT): [BT] or one, by WHOLE.

    WHOLE: a tile lies inside one block.
    """
    if WHOLE:
        block = tl.load(table + t // block_size).to(tl.int64)
        return (block * block_size + t % block_size) * token_stride + tl.zeros([1], tl.int64)
    else:
        at = t + tl.arange(0, BT)
        block = tl.load(table + at // block_size).to(tl.int64)
        return (block * block_size + at % block_size) * token_stride


@triton.jit
def _split(
    qkv, q_norm, k_norm, rotary, k_cache, v_cache, tables, context, part, stat,
    qkv_stride, table_stride, block_size, eps, scale,
    R: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROT: tl.constexpr,
    M: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, NS: tl.constexpr, WHOLE: tl.constexpr,
    STAGES: tl.constexpr, F32: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    split = tl.program_id(0)
    head = tl.program_id(1)
    seq = tl.program_id(2)
    if PDL:
        gdc_wait()
    past = tl.load(context + seq, volatile=True)
    total = past + R
    each = tl.cdiv(tl.cdiv(total, NS), BT) * BT
    start = split * each
    stop = tl.minimum(start + each, total)
    d = tl.arange(0, D)
    m = tl.arange(0, M)
    at = ((seq * HKV + head) * NS + split) * M + m
    if start >= total:
        tl.store(stat + at * 2, float("-inf") + tl.zeros([M], tl.float32))
        tl.store(stat + at * 2 + 1, tl.zeros([M], tl.float32))
        return
    table = tables + seq.to(tl.int64) * table_stride
    token_stride: tl.constexpr = HKV * D
    k_cache += head * D
    v_cache += head * D
    if stop > past:
        r = tl.arange(0, RP)
        p = past + r
        mine = ((r < R) & (p >= start) & (p < stop))[:, None]
        source = qkv + (seq * R + r)[:, None] * qkv_stride + HKV * G * 2 * D + head * D
        turn = rotary + (seq * R + r)[:, None] * ROT
        new_k = _norm_rotate(source, mine, k_norm, turn, eps, D, ROT)
        new_v = tl.load(source + HKV * D + d[None, :], mask=mine, other=0.0)
        block = tl.load(table + p // block_size, mask=r < R, other=0).to(tl.int64)
        to = (block * block_size + p % block_size)[:, None] * token_stride + d[None, :]
        tl.store(k_cache + to, new_k.to(k_cache.dtype.element_ty), mask=mine)
        tl.store(v_cache + to, new_v.to(v_cache.dtype.element_ty), mask=mine)
        tl.debug_barrier()
    row = m // G
    live = (m < R * G)[:, None]
    source = qkv + (seq * R + row)[:, None] * qkv_stride + (head * G + m % G)[:, None] * (2 * D)
    turn = rotary + (seq * R + row)[:, None] * ROT
    q = _norm_rotate(source, live, q_norm, turn, eps, D, ROT)
    wide: tl.constexpr = tl.float32 if F32 else k_cache.dtype.element_ty
    q = q.to(qkv.dtype.element_ty).to(wide)
    top = tl.full([M], float("-inf"), tl.float32)
    norm = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    # the rows of the next tile are looked up one tile ahead: loads never wait for the table
    cells = _cells(table, start, block_size, token_stride, BT, WHOLE)
    for t0 in tl.range(start, stop, BT, num_stages=STAGES):
        t = t0 + tl.arange(0, BT)
        if WHOLE:
            cell = (cells + tl.arange(0, BT) * token_stride)[:, None] + d[None, :]
        else:
            cell = cells[:, None] + d[None, :]
        cells = _cells(table, tl.minimum(t0 + BT, total - 1) // BT * BT, block_size, token_stride,
                       BT, WHOLE)  # fmt: skip
        k = tl.load(k_cache + cell, mask=(t < stop)[:, None], other=0.0).to(wide)
        v = tl.load(v_cache + cell, mask=(t < stop)[:, None], other=0.0).to(wide)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        s = tl.where((t < stop)[None, :] & (t[None, :] <= past + row[:, None]), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - safe[:, None])
        fade = tl.exp2(top - safe)
        norm = norm * fade + tl.sum(p, axis=1)
        acc = tl.dot(p.to(wide), v, acc * fade[:, None], input_precision="ieee")
        top = new_top
    tl.store(stat + at * 2, top)
    tl.store(stat + at * 2 + 1, norm)
    tl.store(part + at[:, None] * D + d[None, :], acc, mask=live)


@triton.jit
def _merge(
    part, stat, qkv, out, out_scale, qkv_stride,
    R: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    NS: tl.constexpr, BD: tl.constexpr, QUANTISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    row = (token % R) * G + head % G
    s = tl.arange(0, NS)
    at = ((token // R * HKV + head // G) * NS + s) * M + row
    top = tl.load(stat + at * 2)
    norm = tl.load(stat + at * 2 + 1)
    weight = tl.exp2(top - tl.max(top, axis=0))
    used = norm > 0.0
    o = tl.load(part + at[:, None] * D + d[None, :], mask=used[:, None], other=0.0)
    weight = tl.where(used, weight, 0.0)
    o = tl.sum(o * weight[:, None], axis=0) / tl.sum(weight * norm, axis=0)
    gate = tl.load(qkv + token * qkv_stride + head * (2 * D) + D + d).to(tl.float32)
    o *= tl.sigmoid(gate)
    if QUANTISE:  # BD is one group of channels
        o, group = quantise(o, 0)
        tl.store(out_scale + (token * HKV * G + head) * (D // BD) + tl.program_id(2), group)
        tl.store(out + (token * HKV * G + head) * D + d, o)
    else:
        tl.store(out + (token * HKV * G + head) * D + d, o.to(out.dtype.element_ty))


def splits_for(sequences: int, kv_heads: int, context: int, programs: int = 264) -> int:
    """Parts per sequence: about ``programs`` in all, at least 64 tokens each; a power of two."""
    wanted = max(1, min(programs // (sequences * kv_heads), -(-context // 64)))
    return min(128, 1 << (wanted - 1).bit_length())


def workspace(
    sequences: int, new_tokens: int, heads: int, kv_heads: int, head_dim: int, splits: int, device
) -> tuple[Tensor, Tensor]:
    """fp32 buffers of the parts' outputs and of their maxima and sums."""
    rows = max(16, triton.next_power_of_2(new_tokens * heads // kv_heads))
    cells = sequences * kv_heads * splits * rows
    return (
        torch.empty(cells, head_dim, dtype=torch.float32, device=device),
        torch.empty(cells, 2, dtype=torch.float32, device=device),
    )


def decode_attention(
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    rotary: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    heads: int,
    eps: float = 1e-6,
    splits: int | None = None,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
    buffers: tuple[Tensor, Tensor] | None = None,
    block: int = 32,
    warps: int = 4,
    stages: int = 2,
    pdl: bool = False,
) -> Tensor:
    """The contract of ``qnext.kernels.attention.decode_attention``, with launch choices.

    Args:
        qkv, q_norm, k_norm, rotary, k_cache, v_cache, block_tables, context_lens, heads, eps: as
            there; tables and lengths are read at run time (a captured step may be replayed).
        splits: parts per sequence, a power of two (``splits_for``).
        out: (N*R, heads*D).
        out_scale: (N*R, heads*D / 128) fp32; with it ``out`` is e4m3 with a scale for every 128
            channels.
        buffers: from ``workspace``.
        block, warps, stages: launch choice.
        pdl: launch with programmatic stream serialization.
    """
    n, (_, block_size, hkv, d) = block_tables.shape[0], k_cache.shape
    r, g = qkv.shape[0] // n, heads // hkv
    if splits is None:
        splits = splits_for(n, hkv, block_tables.shape[1] * block_size)
    out = qkv.new_empty(n * r, heads * d) if out is None else out
    part, stat = buffers or workspace(n, r, heads, hkv, d, splits, qkv.device)
    m = max(16, triton.next_power_of_2(r * g))
    warps = max(warps, m // 16)
    shape = {"R": r, "HKV": hkv, "G": g, "D": d, "M": m, "NS": splits, "PDL": pdl}
    _split[(splits, hkv, n)](
        qkv, q_norm, k_norm, rotary, k_cache, v_cache, block_tables, context_lens, part, stat,
        qkv.stride(0), block_tables.stride(0), block_size, eps, d**-0.5, ROT=rotary.shape[1],
        RP=triton.next_power_of_2(r), BT=block, WHOLE=block_size % block == 0, STAGES=stages,
        F32=k_cache.dtype == torch.float32, num_warps=warps, launch_pdl=pdl, **shape,
    )  # fmt: skip
    quantised = out_scale is not None
    bd = min(128, d) if quantised else d if splits <= 16 else max(d // 4, 16)
    _merge[(n * r, heads, d // bd)](
        part, stat, qkv, out, out_scale if quantised else stat, qkv.stride(0), BD=bd,
        QUANTISE=quantised, num_warps=4, launch_pdl=pdl, **shape,
    )  # fmt: skip
    return out
