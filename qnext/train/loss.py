"""Losses: next token, MTP, and the router's balance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qnext.kernels.cross_entropy import cross_entropy
from qnext.layers.model import CausalLM
from qnext.layers.moe import RouterStats
from qnext.parallel import Alone
from qnext.train.config import LossConfig
from qnext.train.data import IGNORE_INDEX, TrainBatch

#: Most logits that exist at a time: 256 MB in BF16. More tokens at once give no speed.
CHUNK_LOGITS = 1 << 27


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits may exist at a time; a multiple of 128, for the tiles of a GPU."""
    tokens = max(CHUNK_LOGITS // vocab_size, 1)
    return tokens // 128 * 128 or tokens


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
        chunk = chunk_tokens(len(weight))
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
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
    share = counts.to(probs.dtype) / counts.sum().clamp(min=1)
    return len(counts) * (share * probs).sum()


@dataclass(frozen=True)
class Step:
    """What the loss of a micro batch must know of the whole optimizer step.

    Attributes:
        valid: depth + 1 counts: the labels of the step for each depth (all micro batches, all
            ranks), at least 1.
        tokens: of the step.
    """

    valid: tuple[int, ...]
    tokens: int


class Objective(nn.Module):
    """All losses of one micro batch as one forward pass, normalised for the whole step.

    A micro batch gives its part of the step's loss: summed over micro batches and ranks, the
    parts are the loss of the whole batch, and so are their gradients.

    Args:
        model: in training mode.
        config: weights of the losses; scoring needs none.
        ranks: how the tokens are shared out.
    """

    def __init__(
        self, model: CausalLM, config: LossConfig | None = None, ranks: Alone | None = None
    ) -> None:
        super().__init__()
        self.model, self.config, self.ranks = model, config or LossConfig(), ranks or Alone()
        self.depth = self.config.mtp_depth if model.mtp is not None else 0

    def forward(
        self, batch: TrainBatch, step: Step, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The parts of the loss.

        Args:
            batch: the micro batch.
            step: what it is a part of.
            seen: (L, E) expert counts of the step's earlier micro batches, so that balance is
                judged over the global batch.

        Returns:
            ``(total, main, mtp, balance, counts)``: total is differentiable, the next three are
            its unweighted parts (balance as a mean over sparse layers), counts (L, E) int64 are
            those of this micro batch over all ranks.
        """
        stats, config = RouterStats(), self.config
        rows = self.ranks.rows(len(batch.input_ids))
        hidden = self.model.hidden_states(batch.input_ids, batch.packed, aux=stats)
        main = self._entropy(hidden, batch, step, 0, rows)
        mtp = torch.zeros_like(main)
        ahead = hidden
        for depth in range(1, self.depth + 1):
            # Tokens past the end of a sequence are never labels; any id will do for them.
            following = batch.labels[depth - 1].clamp(min=0)
            ahead = self.model.draft_states(ahead, following, batch.packed, aux=stats)
            mtp = mtp + self._entropy(ahead, batch, step, depth, rows) / self.depth
        balance, zloss = torch.zeros_like(main), torch.zeros_like(main)
        counts = torch.zeros(0, 0, dtype=torch.int64, device=main.device)
        if stats.counts:
            counts = self.ranks.sum_counts(torch.stack(stats.counts))
            over = counts if seen is None else counts + seen
            for probs, chosen in zip(stats.probs, over, strict=True):
                balance = balance + load_balance_loss(probs / step.tokens, chosen)
            zloss = torch.stack(stats.z).sum() / step.tokens
        total = main + config.mtp_weight * mtp
        total = total + config.load_balance * balance + config.router_z * zloss
        balance = balance.detach() / max(len(stats.counts), 1)
        return total, main.detach(), mtp.detach(), balance, counts

    @torch.no_grad()
    def score(self, batch: TrainBatch) -> Tensor:
        """Sums over this rank's tokens that ``qnext.train.evaluate`` makes its figures of.

        Returns:
            (8,) fp64: nats, arg-max hits, predicted tokens; drafts that the main model's arg-max
            confirms, the probability it gives them, drafts that are the text, judged drafts; all
            tokens.
        """
        model, rows = self.model, self.ranks.rows(len(batch.input_ids))
        chunk = chunk_tokens(model.config.vocab_size)
        hidden = model.hidden_states(batch.input_ids, batch.packed)
        made = None
        if model.mtp is not None:
            following = batch.labels[0].clamp(min=0)
            ahead = model.draft_states(hidden, following, batch.packed)
            drafts = torch.cat([model.logits(part).argmax(1) for part in ahead.split(chunk)])
            # The draft made at i is about the token at i + 2: the main row i + 1 judges it.
            made = self.ranks.before(drafts, batch.packed)
        sums = torch.zeros(8, dtype=torch.float64, device=hidden.device)
        for start in range(rows.start, rows.stop, chunk):
            part = slice(start, min(start + chunk, rows.stop))
            labels = batch.labels[0, part]
            valid = labels != IGNORE_INDEX
            scores = model.logits(hidden[part]).float().log_softmax(1)
            best = scores.argmax(1)
            picked = scores.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
            sums[0] -= (picked * valid).sum()
            sums[1] += ((best == labels) & valid).sum()
            sums[2] += valid.sum()
            sums[7] += len(labels)
            if made is not None:
                inside = (batch.packed.positions[part] >= 1) & valid
                chance = scores.gather(1, made[part].unsqueeze(1)).squeeze(1).exp()
                sums[3] += ((best == made[part]) & inside).sum()
                sums[4] += (chance * inside).sum()
                sums[5] += ((labels == made[part]) & inside).sum()
                sums[6] += inside.sum()
        return sums

    def _entropy(
        self, hidden: Tensor, batch: TrainBatch, step: Step, depth: int, rows: slice
    ) -> Tensor:
        head = self.model.lm_head if self.model.lm_head is not None else (
            self.model.model.embed_tokens
        )  # fmt: skip
        labels = batch.labels[depth][rows]
        return linear_cross_entropy(hidden[rows], head.weight, labels, step.valid[depth])
