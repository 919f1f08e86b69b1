"""Routing and experts in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def route(logits: Tensor, top_k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """See the contract in ``qnext.kernels.experts``."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    weights, ids = wide.softmax(-1).topk(top_k, -1)
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), ids


def experts(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """See the contract in ``qnext.kernels.experts``."""
    tokens, top_k = ids.shape
    if tokens * top_k <= 2 * len(gate_up_proj) and not torch.is_grad_enabled():
        return _few(x, gate_up_proj, down_proj, ids, weights)
    return _sorted(x, gate_up_proj, down_proj, ids, weights)


def _few(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Each chosen expert matrix once as a plain product: no weight is copied."""
    rows: dict[int, list[tuple[int, int]]] = {}
    for token, chosen in enumerate(ids.tolist()):
        for rank, expert in enumerate(chosen):
            rows.setdefault(expert, []).append((token, rank))
    if len(x) == 1:
        scale = weights[0].unbind()
        out = None
        for expert, [(_, rank)] in rows.items():
            gate, up = F.linear(x, gate_up[expert]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, down[expert]) * scale[rank]
            out = y if out is None else out + y
        return out if out is not None else torch.zeros_like(x)
    out = torch.zeros_like(x)
    for expert, places in rows.items():
        index = torch.tensor([t for t, _ in places], device=x.device)
        rank = torch.tensor([r for _, r in places], device=x.device)
        gate, up = F.linear(x[index], gate_up[expert]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, down[expert])
        out.index_add_(0, index, y * weights[index, rank, None])
    return out


def _sorted(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Rows sorted by expert, one product per expert that got any."""
    tokens, top_k = ids.shape
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=len(gate_up)).tolist()
    rows = x[order // top_k]
    parts = []
    for expert, block in enumerate(rows.split(counts)):
        if len(block):
            gate, up = F.linear(block, gate_up[expert]).chunk(2, -1)
            parts.append(F.linear(F.silu(gate) * up, down[expert]))
    y = torch.cat(parts) * weights.flatten()[order, None]
    # Back to (token, rank) order, so that the sum over ranks has one fixed order.
    out = torch.empty_like(y).index_copy(0, order, y)
    return out.view(tokens, top_k, -1).sum(1)
