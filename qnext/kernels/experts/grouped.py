"""Experts through torch's grouped matrix product: rows sorted by expert, one call per matrix.

Differentiable, no host synchronisation; used on CUDA for training and for prefill. Rows move by
gathers only, in both directions: no atomics, so that results do not depend on timing.
"""

from __future__ import annotations

from typing import Any

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
    num = len(gate_up_proj)
    # Few bits make the radix sort short; expert counts fit easily.
    by_expert, order = ids.flatten().to(torch.int16).sort(stable=True)
    ends = torch.searchsorted(
        by_expert, torch.arange(num, dtype=torch.int16, device=x.device), right=True, out_int32=True
    )
    inverse = torch.empty_like(order)
    inverse.scatter_(0, order, torch.arange(len(order), device=x.device))
    rows = _ToExperts.apply(x, order // ids.shape[1], inverse)
    gate, up = F.grouped_mm(rows, gate_up_proj.transpose(1, 2), offs=ends).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, down_proj.transpose(1, 2), offs=ends)
    # In (token, rank) order: the sum over ranks has one fixed order.
    y = _ToTokens.apply(y, order, inverse).view(*ids.shape, x.shape[1])
    return (y * weights.unsqueeze(-1)).sum(1)


class _ToExperts(torch.autograd.Function):
    """Each token's row once per chosen expert, sorted by expert: (T, H) -> (T k, H)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.shape = x.shape
        return x[token]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        tokens, width = ctx.shape
        return grad[inverse].view(tokens, len(grad) // max(tokens, 1), width).sum(1), None, None


class _ToTokens(torch.autograd.Function):
    """Rows sorted by expert back in (token, rank) order."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return y[inverse]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (order,) = ctx.saved_tensors
        return grad[order], None, None
