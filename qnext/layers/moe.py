"""Sparse mixture of experts with a gated shared expert (spec section 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qnext.config import ModelConfig
from qnext.kernels.experts import experts, route
from qnext.layers.mlp import MLP


class RouterStats:
    """What the load-balancing and z losses need, one entry per MoE layer that ran.

    Attributes:
        probs: (E,) full-softmax probability, summed over the tokens, differentiable.
        counts: (E,) int64 tokens that chose each expert.
        z: scalar sum of ``logsumexp(logits)^2``, differentiable.
    """

    # Not a dataclass: wrappers that look for tensors in arguments copy dataclasses.
    def __init__(self) -> None:
        self.probs: list[Tensor] = []
        self.counts: list[Tensor] = []
        self.z: list[Tensor] = []

    def add(self, logits: Tensor, ids: Tensor) -> None:
        """Record one layer's router logits (T, E) and choices (T, k)."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        self.probs.append(wide.softmax(-1).sum(0))
        # scatter_add instead of bincount: no host synchronisation on a GPU.
        chosen = ids.flatten()
        counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=ids.device)
        self.counts.append(counts.scatter_add_(0, chosen, torch.ones_like(chosen)))
        self.z.append(wide.logsumexp(-1).square().sum())


class Experts(nn.Module):
    """The routed experts as two stacked tensors."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x (T, H), ids and weights (T, k) -> (T, H)."""
        return experts(x, self.gate_up_proj, self.down_proj, ids, weights)


class SparseMoe(nn.Module):
    """Router, routed experts, and (except in Qwen3-MoE) a shared expert with its own gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        width = config.hidden_size
        self.gate = nn.Linear(width, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, width, config.moe_intermediate_size)
        self.shared_expert: MLP | None = None
        self.shared_expert_gate: nn.Linear | None = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = MLP(width, config.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor, stats: RouterStats | None = None) -> Tensor:
        """(T, H) -> (T, H)."""
        logits = self.gate(x)
        weights, ids = route(logits, self.top_k, self.norm_topk_prob)
        if stats is not None:
            stats.add(logits, ids)
        out = self.experts(x, ids, weights)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            out = out + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return out
