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
    out = torch.zeros_like(x)
    for expert, places in rows.items():
        index, ranks = torch.tensor(places, device=x.device).unbind(1)
        gate, up = F.linear(x[index], gate_up[expert]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, down[expert])
        out.index_add_(0, index, y * weights[index, ranks, None])
    return out


def _sorted(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Rows grouped by expert, one pair of products per expert that got any."""
    top_k = ids.shape[1]
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=len(gate_up)).tolist()
    scale = weights.flatten()[order, None]
    out = torch.zeros_like(x)
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            token = order[begin : begin + count] // top_k
            gate, up = F.linear(x[token], gate_up[expert]).chunk(2, -1)
            # The weight goes into the narrow side: the same product for less memory.
            act = F.silu(gate) * up * scale[begin : begin + count]
            y = F.linear(act, down[expert])
            out = (
                out.index_add(0, token, y)
                if torch.is_grad_enabled()
                else out.index_add_(0, token, y)
            )
            begin += count
    return out
