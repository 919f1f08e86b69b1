"""Experts through torch's grouped matrix product: rows sorted by expert, one call per matrix.

Differentiable, no host synchronisation; used on CUDA for training and for prefill.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.kernels.experts import reference


def experts_grouped(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """See the contract in ``qnext.kernels.experts``."""
    if x.dtype != torch.bfloat16:  # all that grouped_mm takes
        return reference.experts(x, gate_up_proj, down_proj, ids, weights)
    tokens, top_k = ids.shape
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    counts = torch.zeros(len(gate_up_proj), dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    ends = counts.cumsum(0, dtype=torch.int32)
    rows = x[order // top_k]
    gate, up = F.grouped_mm(rows, gate_up_proj.transpose(1, 2), offs=ends).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, down_proj.transpose(1, 2), offs=ends)
    y = y * weights.flatten()[order, None]
    # Back to (token, rank) order: the sum over ranks has one fixed order.
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return y[inverse].view(tokens, top_k, -1).sum(1)
