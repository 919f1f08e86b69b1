"""Causal attention over packed sequences in torch: SDPA, one sequence after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float
) -> Tensor:
    """See the contract in ``qnext.kernels.attention``."""
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out = [
        attend(q[a:b], k[c:d], v[c:d], scale)
        for a, b, c, d in zip(q_bounds, q_bounds[1:], k_bounds, k_bounds[1:], strict=False)
    ]
    return out[0] if len(out) == 1 else torch.cat(out)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Sequence[int],
    lengths: Sequence[int],
    scale: float,
    kv_shift: int = 0,
) -> Tensor:
    """See the contract in ``qnext.kernels.attention``: gathers, then one sequence after another."""
    out, start, size = [], 0, k_cache.shape[1]
    for n, (past, new) in enumerate(zip(context_lens, lengths, strict=True)):
        total = kv_shift + past + new
        blocks = block_tables[n, : -(-total // size)]
        keys, values = (
            cache[blocks].flatten(0, 1)[kv_shift:total].to(q.dtype) for cache in (k_cache, v_cache)
        )
        out.append(attend(q[start : start + new], keys, values, scale))
        start += new
    return out[0] if len(out) == 1 else torch.cat(out)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One sequence: q (T, H, D) against k, v (S, Hkv, D), causal and aligned at the end."""
    new, total = len(q), len(k)
    heads, kv_heads = q.shape[1], k.shape[1]
    if new == 1:
        # Fold the query heads that share a key head into rows: K and V are read once.
        rows = q.view(1, kv_heads, heads // kv_heads, -1)
        out = F.scaled_dot_product_attention(
            rows, k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0), scale=scale
        )
        return out.reshape(1, heads, -1)
    mask = None
    if new != total:
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k.transpose(0, 1).unsqueeze(0),
        v.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return out.squeeze(0).transpose(0, 1)


def _norm_rotate(x: Tensor, weight: Tensor, rotary: Tensor, eps: float) -> Tensor:
    """Zero-centred RMSNorm and half-split rotation of x (R, heads, D), in fp32."""
    x = x.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + weight.float())
    cos, sin = (t[:, None] for t in rotary.float().chunk(2, -1))
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


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
) -> Tensor:
    """See the contract in ``qnext.kernels.attention``; one sequence after the other."""
    n, (_, size, kv_heads, d) = len(block_tables), k_cache.shape
    r = len(qkv) // n
    out = qkv.new_empty(n * r, heads * d)
    for i, past in enumerate(context_lens.tolist()):
        rows, turn = qkv[i * r : (i + 1) * r], rotary[i * r : (i + 1) * r]
        query, gate = rows[:, : heads * 2 * d].reshape(r, heads, 2 * d).split(d, -1)
        key, value = rows[:, heads * 2 * d :].reshape(r, 2, kv_heads, d).unbind(1)
        q = _norm_rotate(query, q_norm, turn, eps).to(qkv.dtype)
        position = torch.arange(past + r, device=qkv.device)
        block, row = block_tables[i].long()[position // size], position % size
        k_cache[block[past:], row[past:]] = _norm_rotate(key, k_norm, turn, eps).to(k_cache.dtype)
        v_cache[block[past:], row[past:]] = value.to(v_cache.dtype)
        k, v = k_cache[block, row].to(q.dtype), v_cache[block, row].to(q.dtype)
        mixed = attend(q, k, v, d**-0.5).reshape(r, -1).float()
        mixed = mixed * gate.reshape(r, -1).float().sigmoid()
        out[i * r : (i + 1) * r] = mixed.to(out.dtype)
    return out
