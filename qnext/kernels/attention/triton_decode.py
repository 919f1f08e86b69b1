"""Triton attention of 1..9 new tokens per sequence: split KV, packed query heads, gated output.

Two launches. ``_split`` normalises and rotates the queries (every program its own copy, they are
small), writes the new keys and values to the cache where its part of the sequence holds them, and
attends: all query heads of one KV head and all new tokens are the rows of one ``tl.dot``, so K and
V are read once. ``_merge`` joins the parts by their log-sum-exp and applies the output gate.
Spec section 3: head layout [query | gate], zero-centred q/k norm, rotation of the first channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qnext.kernels.linear.triton import prefetch_l2

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
def _split(
    qkv, q_norm, k_norm, rotary, k_cache, v_cache, slots, context, part, stat,
    qkv_stride, slot_stride, head_stride, token_stride, eps, scale,
    R: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROT: tl.constexpr,
    M: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, NS: tl.constexpr,
    STAGES: tl.constexpr, F32: tl.constexpr, DENSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    split = tl.program_id(0)
    head = tl.program_id(1)
    seq = tl.program_id(2)
    if PDL:
        if DENSE:
            # may still be the lengths of the step before: good enough to fetch by
            past = tl.load(context + seq)
            each = tl.cdiv(tl.cdiv(past + R, NS), BT) * BT
            start = split * each
            old = tl.minimum(start + each, past) - start
            base = tl.load(slots + seq).to(tl.int64) * slot_stride + head * head_stride
            if old > 0:
                size = old * (D * 2)
                prefetch_l2(k_cache + base + start * token_stride, size)
                prefetch_l2(v_cache + base + start * token_stride, size)
        gdc_wait()
    past = tl.load(context + seq, volatile=True)
    total = past + R
    each = tl.cdiv(tl.cdiv(total, NS), BT) * BT
    start = split * each
    stop = tl.minimum(start + each, total)
    base = tl.load(slots + seq, volatile=True).to(tl.int64) * slot_stride + head * head_stride
    d = tl.arange(0, D)
    m = tl.arange(0, M)
    at = ((seq * HKV + head) * NS + split) * M + m
    if start >= total:
        tl.store(stat + at * 2, float("-inf") + tl.zeros([M], tl.float32))
        tl.store(stat + at * 2 + 1, tl.zeros([M], tl.float32))
        return
    if stop > past:
        r = tl.arange(0, RP)
        mine = ((r < R) & (past + r >= start) & (past + r < stop))[:, None]
        source = qkv + (seq * R + r)[:, None] * qkv_stride + HKV * G * 2 * D + head * D
        turn = rotary + (seq * R + r)[:, None] * ROT
        new_k = _norm_rotate(source, mine, k_norm, turn, eps, D, ROT)
        new_v = tl.load(source + HKV * D + d[None, :], mask=mine, other=0.0)
        to = base + (past + r)[:, None].to(tl.int64) * token_stride + d[None, :]
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
    for t0 in tl.range(start, stop, BT, num_stages=STAGES):
        t = t0 + tl.arange(0, BT)
        cell = base + t[:, None].to(tl.int64) * token_stride + d[None, :]
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
    part, stat, qkv, out, qkv_stride,
    R: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    NS: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr,
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
    tl.store(out + (token * HKV * G + head) * D + d, o.to(out.dtype.element_ty))


def splits_for(sequences: int, kv_heads: int, context: int) -> int:
    """Parts per sequence: about one program per multiprocessor, at least 32 tokens each."""
    wanted = max(1, min(132 // (sequences * kv_heads), -(-context // 32)))
    return 1 << (wanted - 1).bit_length() if wanted < 64 else 64


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
    slots: Tensor,
    context_lens: Tensor,
    *,
    heads: int,
    splits: int,
    eps: float = 1e-6,
    out: Tensor | None = None,
    buffers: tuple[Tensor, Tensor] | None = None,
    block: int = 32,
    warps: int = 4,
    stages: int = 2,
    pdl: bool = False,
) -> Tensor:
    """Gated attention of the new tokens over cache and themselves; writes their K and V.

    Args:
        qkv: (N*R, heads*2*D + 2*Hkv*D): per head query and gate, then keys, then values, as the
            projections give them; R new tokens of each of N sequences, 1 <= R <= 9.
        q_norm, k_norm: (D,) zero-centred norm weights.
        rotary: (N*R, rotary_dim) fp32, cosines and then sines of each new token's position;
            the same for all layers of a step.
        k_cache, v_cache: (slots, Hkv, capacity, D); the new tokens go to rows
            ``context_lens[n] ..`` of slot ``slots[n]``.
        slots, context_lens: (N,) int32 on the device, read at run time (graphs may be replayed).
        heads: query heads.
        splits: parts per sequence, a power of two (``splits_for``).
        eps: of the norms.
        out: (N*R, heads*D).
        buffers: from ``workspace``.
        block, warps, stages: launch choice.
        pdl: launch with programmatic stream serialization.
    """
    n, (_, hkv, _, d) = slots.shape[0], k_cache.shape
    r, g = qkv.shape[0] // n, heads // hkv
    out = qkv.new_empty(n * r, heads * d) if out is None else out
    part, stat = buffers or workspace(n, r, heads, hkv, d, splits, qkv.device)
    m = max(16, triton.next_power_of_2(r * g))
    warps = max(warps, m // 16)
    shape = {"R": r, "HKV": hkv, "G": g, "D": d, "M": m, "NS": splits, "PDL": pdl}
    _split[(splits, hkv, n)](
        qkv, q_norm, k_norm, rotary, k_cache, v_cache, slots, context_lens, part, stat,
        qkv.stride(0), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), eps,
        d**-0.5, ROT=rotary.shape[1], RP=triton.next_power_of_2(r), BT=block,
        STAGES=stages, F32=k_cache.dtype == torch.float32, DENSE=k_cache.stride(2) == d,
        num_warps=warps, launch_pdl=pdl, **shape,
    )  # fmt: skip
    bd = d if splits <= 16 else d // 2
    _merge[(n * r, heads, d // bd)](
        part, stat, qkv, out, qkv.stride(0), BD=bd, num_warps=4, launch_pdl=pdl, **shape
    )
    return out
