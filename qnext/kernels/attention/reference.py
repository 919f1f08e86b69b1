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
