"""Triton around prefill attention over a paged cache, and the attention itself for ragged pieces.

``store_qkv``: q/k norm, partial rotation, keys and values to their cache rows, in one pass over
the projections. ``attend_paged``: flash attention that reads the cache through the block
tables; it needs no lengths on the host. ``merge``: joins two attentions over disjoint keys by
their log-sum-exp, applies the output gate and gives FP8 rows. Spec section 3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext.kernels.attention.triton_decode import _norm_rotate
from qnext.kernels.norm.triton_prefill import FP8, store_fp8

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _store(
    qkv, q_norm, k_norm, rotary, rows, q, k_cache, v_cache, T, s_qkv, eps,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, ROT: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """BT tokens of one query head, or of one key head and its values."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    head = tl.program_id(1)
    d = tl.arange(0, D)[None, :]
    live = t < T
    row = t.to(tl.int64)
    turn = rotary + row * ROT
    if head < H:
        source = qkv + row * s_qkv + head * (2 * D)
        out = _norm_rotate(source, live, q_norm, turn, eps, D, ROT)
        tl.store(q + (row * H + head) * D + d, out.to(q.dtype.element_ty), mask=live)
    else:
        head -= H
        source = qkv + row * s_qkv + H * 2 * D + head * D
        out = _norm_rotate(source, live, k_norm, turn, eps, D, ROT)
        to = (tl.load(rows + row, mask=live, other=0) * HKV + head) * D + d
        tl.store(k_cache + to, out.to(k_cache.dtype.element_ty), mask=live)
        value = tl.load(source + HKV * D + d, mask=live, other=0.0)
        tl.store(v_cache + to, value.to(v_cache.dtype.element_ty), mask=live)


@triton.jit
def _attend(
    q, k_cache, v_cache, block_tables, context_lens, cu_seqlens, out, lse, s_table, scale, T, SHIFT,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, LSE: tl.constexpr, F32: tl.constexpr,
):  # fmt: skip
    """BM rows, each a query of one token and one of the G heads of a key head; causal."""
    n = tl.program_id(2)
    hkv = tl.program_id(1)
    bos = tl.load(cu_seqlens + n)
    new = tl.load(cu_seqlens + n + 1) - bos
    # the last tiles have the most keys: they go first
    tile = tl.cdiv(new * G, BM) - 1 - tl.program_id(0)
    if tile < 0:
        return
    past = tl.load(context_lens + n)
    m = tile * BM + tl.arange(0, BM)
    pos = m // G
    live = pos < new
    head = hkv * G + m % G
    d = tl.arange(0, D)
    at = ((bos + pos).to(tl.int64) * H + head)[:, None] * D + d[None, :]
    wide: tl.constexpr = tl.float32 if F32 else q.dtype.element_ty
    qt = tl.load(q + at, mask=live[:, None], other=0.0).to(wide)
    top = tl.full([BM], float("-inf"), tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    stop = past + tl.minimum((tile * BM + BM - 1) // G + 1, new)
    HKV: tl.constexpr = H // G
    for s0 in tl.range(0, stop, BN, num_stages=STAGES):
        s = s0 + tl.arange(0, BN)
        inside = s < stop
        r = s + SHIFT
        block = tl.load(block_tables + n * s_table + r // BLOCK, mask=inside, other=0)
        row = ((block.to(tl.int64) * BLOCK + r % BLOCK) * HKV + hkv)[:, None] * D + d[None, :]
        kt = tl.load(k_cache + row, mask=inside[:, None], other=0.0).to(wide)
        vt = tl.load(v_cache + row, mask=inside[:, None], other=0.0).to(wide)
        x = tl.dot(qt, tl.trans(kt), input_precision="ieee") * (scale * LOG2E)
        x = tl.where(s[None, :] <= past + pos[:, None], x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 1))
        p = tl.exp2(x - new_top[:, None])
        fade = tl.exp2(top - new_top)
        norm = norm * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(wide), vt, acc * fade[:, None], input_precision="ieee")
        top = new_top
    acc /= norm[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=live[:, None])
    if LSE:
        value = (top + tl.log2(norm)) / LOG2E
        tl.store(lse + head.to(tl.int64) * T + bos + pos, value, mask=live)


@triton.jit
def _merge(
    a, b, lse_a, lse_b, lse, gate, out, quantised, scales, T, s_gate,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, TWO: tl.constexpr,
    QUANT: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """BT tokens, BD channels of one head: joined, gated, quantised."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    head = tl.program_id(1)
    part = tl.program_id(2)
    d = part * BD + tl.arange(0, BD)[None, :]
    live = t < T
    row = t.to(tl.int64)
    at = (row * H + head) * D + d
    y = tl.load(a + at, mask=live, other=0.0).to(tl.float32)
    if TWO:
        x = tl.load(lse_a + head.to(tl.int64) * T + row, mask=live, other=0.0)
        z = tl.load(lse_b + head.to(tl.int64) * T + row, mask=live, other=0.0)
        share = 1.0 / (1.0 + tl.exp(z - x))
        other = tl.load(b + at, mask=live, other=0.0).to(tl.float32)
        y = y * share + other * (1.0 - share)
        if part == 0:
            top = tl.maximum(x, z)
            both = top + tl.log(tl.exp(x - top) + tl.exp(z - top))
            tl.store(lse + head.to(tl.int64) * T + row, both, mask=live)
    if GATE:
        open_ = tl.load(gate + row * s_gate + head * (2 * D) + D + d, mask=live, other=0.0)
        y *= tl.sigmoid(open_.to(tl.float32))
    y = y.to(out.dtype.element_ty)
    if QUANT:
        group = (head * (D // BD) + part).to(tl.int64) * (BD // 128)
        store_fp8(y.to(tl.float32), quantised, scales, at, group, T, row, live, BD, BT)
    else:
        tl.store(out + at, y, mask=live)


def store_qkv(
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    rotary: Tensor,
    rows: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    heads: int,
    eps: float,
) -> Tensor:
    """Queries (T, heads, D), normed and turned; the new keys and values go to the cache.

    Args:
        qkv: (T, heads * 2 D + 2 Hkv D), rows may be strided: per head query and gate, then keys,
            then values.
        q_norm, k_norm: (D,) zero-centred norm weights.
        rotary: (T, rotary_dim) fp32, cosines and then sines of each token's position.
        rows: (T,) int64 cache row of each token, ``block * block_size + offset``.
        k_cache, v_cache: (num_blocks, block_size, Hkv, D).
        heads: query heads.
        eps: of the norms.
    """
    tokens, (*_, kv_heads, width) = len(qkv), k_cache.shape
    q = qkv.new_empty(tokens, heads, width)
    _store[(triton.cdiv(tokens, 16), heads + kv_heads)](
        qkv, q_norm, k_norm, rotary, rows, q, k_cache, v_cache, tokens, qkv.stride(0), eps,
        H=heads, HKV=kv_heads, D=width, ROT=rotary.shape[1], BT=16, num_warps=4,
    )  # fmt: skip
    return q


def attend_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    max_seqlen: int,
    kv_shift: int = 0,
    *,
    config: tuple[int, int, int, int] = (128, 64, 8, 2),
    with_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """See the contract in ``qnext.kernels.attention``; also the log-sum-exp (H, T) if wanted.

    ``context_lens`` (N,) and the bounds ``cu_seqlens`` (N + 1,) are int32 on the device.
    ``config``: rows (tokens times heads of a key head), keys at a time, warps, stages.
    """
    tokens, heads, width = q.shape
    kv_heads, group = k_cache.shape[2], heads // k_cache.shape[2]
    bm, bn, warps, stages = config
    out = torch.empty_like(q)
    lse = torch.empty(heads, tokens if with_lse else 0, dtype=torch.float32, device=q.device)
    _attend[(triton.cdiv(max_seqlen * group, bm), kv_heads, len(context_lens))](
        q, k_cache, v_cache, block_tables, context_lens, cu_seqlens, out, lse,
        block_tables.stride(0), scale, tokens, kv_shift, H=heads, G=group, D=width, BLOCK=k_cache.shape[1],
        BM=bm, BN=bn, STAGES=stages, LSE=with_lse, F32=q.dtype == torch.float32, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return out, lse


def merge(
    first: tuple[Tensor, Tensor | None],
    second: tuple[Tensor, Tensor] | None,
    gate: Tensor | None = None,
    *,
    quantised: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Join attentions over disjoint keys, gate, and quantise.

    Args:
        first: (T, H, D) and its natural log-sum-exp (H, T); alone it needs none.
        second: likewise, or None.
        gate: (T, ...) rows that hold, per head, D numbers and then the D gates.
        quantised: FP8 rows and (H * D / 128, T) scales instead of rows in the dtype of ``first``.

    Returns:
        ``(rows, scales, lse)``: (T, H * D), scales (empty if not quantised), and the (H, T)
        log-sum-exp of both.
    """
    a, lse_a = first[0].contiguous(), first[0] if first[1] is None else first[1]
    b, lse_b = (a, lse_a) if second is None else (second[0].contiguous(), second[1])
    tokens, heads, width = a.shape
    out = a.new_empty(0 if quantised else tokens, heads * width)
    lse = lse_a if second is None else torch.empty_like(lse_a)
    small = torch.empty(tokens if quantised else 0, heads * width, dtype=FP8, device=a.device)
    scales = torch.empty(
        heads * width // 128 if quantised else 0, tokens, dtype=torch.float32, device=a.device
    )
    columns = min(width, 128)
    _merge[(triton.cdiv(tokens, 32), heads, width // columns)](
        a, b, lse_a, lse_b, lse, a if gate is None else gate, out, small, scales, tokens,
        0 if gate is None else gate.stride(0), H=heads, D=width, BD=columns, BT=32,
        TWO=second is not None, QUANT=quantised, GATE=gate is not None, num_warps=4,
    )  # fmt: skip
    return (small if quantised else out), scales, lse
