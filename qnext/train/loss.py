"""Losses: next token, MTP, and the router's balance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qnext.kernels.cross_entropy import cross_entropy
from qnext.layers.model import CausalLM
from qnext.layers.moe import RouterStats
from qnext.train.config import LossConfig
from qnext.train.data import TrainBatch

CHUNK_TOKENS = 16384


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of ``hidden @ weight.T`` that never holds all logits.

    Both gradients are computed beside the loss, a chunk of tokens at a time.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, count: int) -> Tensor:
        grads = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if grads else None
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_weight = torch.zeros_like(weight, dtype=wide) if grads else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            losses, slopes = cross_entropy(hidden[part] @ weight.t(), labels[part], 1 / count)
            loss += losses.sum() / count
            if grad_hidden is not None and grad_weight is not None:
                grad_hidden[part] = slopes @ weight
                grad_weight += slopes.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        return grad_hidden, (grad_weight * grad).to(ctx.dtype), None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, count: int) -> Tensor:
    """Sum of cross-entropies over the valid labels, divided by ``count``.

    Args:
        hidden: (T, H).
        weight: (V, H) of the head.
        labels: (T,) int64; negative ones (IGNORE_INDEX) are left out.
        count: valid labels of the whole step (all micro batches, all ranks).

    Returns:
        fp32 scalar, in nats (fp64 for fp64 inputs).
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, count)  # type: ignore[no-any-return]


def load_balance_loss(probs: Tensor, counts: Tensor) -> Tensor:
    """``E * sum_e f_e P_e`` (arXiv 2501.11873, spec section 5); 1 at perfect balance.

    Args:
        probs: (E,) mean full-softmax probability, differentiable.
        counts: (E,) how often each expert was chosen in the global batch.
    """
    share = counts.float() / counts.sum().clamp(min=1)
    return len(counts) * (share * probs).sum()


@dataclass
class Losses:
    """Parts of one micro step's loss; all scalars on the device."""

    total: Tensor
    main: Tensor
    mtp: Tensor
    balance: Tensor
    counts: list[Tensor]


def compute_losses(
    model: CausalLM,
    batch: TrainBatch,
    config: LossConfig,
    valid: Sequence[int],
    micro_batches: int = 1,
    seen: list[Tensor] | None = None,
) -> Losses:
    """All losses of one micro batch, normalised for the whole step.

    Args:
        model: in training mode.
        batch: the micro batch.
        config: weights of the losses.
        valid: depth + 1 counts: the valid labels of the whole step for each depth, at least 1.
        micro_batches: pieces in the step.
        seen: expert counts of the step's earlier micro batches, so that balance is judged
            over the global batch.
    """
    stats = RouterStats()
    hidden = model.hidden_states(batch.input_ids, batch.packed, aux=stats)
    head = model.lm_head.weight if model.lm_head is not None else model.model.embed_tokens.weight
    main = linear_cross_entropy(hidden, head, batch.labels[0], valid[0])
    mtp = torch.zeros_like(main)
    if model.mtp is not None and config.mtp_depth:
        ahead = hidden
        for depth in range(1, config.mtp_depth + 1):
            # Tokens past the end of a sequence are never labels; any id will do for them.
            following = batch.labels[depth - 1].clamp(min=0)
            ahead = model.draft_states(ahead, following, batch.packed, aux=stats)
            mtp = mtp + linear_cross_entropy(ahead, head, batch.labels[depth], valid[depth])
        mtp = mtp / config.mtp_depth
    balance = torch.zeros_like(main)
    zloss = torch.zeros_like(main)
    for i, (probs, counts) in enumerate(zip(stats.probs, stats.counts, strict=True)):
        over = counts + seen[i] if seen else counts
        balance = balance + load_balance_loss(probs, over) / micro_batches
        zloss = zloss + stats.z[i] / micro_batches
    total = main + config.mtp_weight * mtp + config.load_balance * balance + config.router_z * zloss
    if stats.probs:
        balance = balance / len(stats.probs)
    return Losses(total, main.detach(), mtp.detach(), balance.detach(), stats.counts)
