"""Held-out loss, bits per byte, and how often the first MTP draft would be accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from qnext.layers.model import CausalLM
from qnext.train.data import IGNORE_INDEX, TokenShards, heldout_batches

CHUNK_TOKENS = 8192


@dataclass(frozen=True)
class Evaluation:
    """Figures on held-out text.

    Attributes:
        loss: nats per token.
        bits_per_byte: all nats in bits, over the UTF-8 bytes of the text.
        accuracy: share of tokens where the model's arg-max is the text.
        draft_agreement: share of places where the first MTP draft equals the main model's
            arg-max one token later, given the text: greedy acceptance on this text.
        draft_acceptance: mean probability that the main model gives to the first draft:
            acceptance of greedy drafts when sampling at temperature 1.
        draft_accuracy: share of places where the first MTP draft is the text itself.
        tokens: predicted tokens.
    """

    loss: float
    bits_per_byte: float
    accuracy: float
    draft_agreement: float | None
    draft_acceptance: float | None
    draft_accuracy: float | None
    tokens: int

    def to_dict(self) -> dict[str, float | int | None]:
        """As JSON."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: CausalLM, shards: Sequence[TokenShards], seq_len: int, tokens: int
) -> Evaluation:
    """Score every held-out document once, in sequences of at most ``seq_len`` tokens.

    The first token of each sequence is not predicted; bits per byte divide by all bytes scaled
    by the share of tokens that are predicted.
    """
    was_training = model.training
    model.eval()
    nats = hits = agree = accept = right = 0.0
    count = places = total = 0
    batches = (b for part in shards for b in heldout_batches(part, tokens, seq_len, 1))
    for batch in batches:
        batch = batch.to(model.device)
        hidden = model.hidden_states(batch.input_ids, batch.packed)
        total += len(batch.input_ids)
        drafts = None
        if model.mtp is not None:
            following = batch.labels[0].clamp(min=0)
            ahead = model.draft_states(hidden, following, batch.packed)
            drafts = torch.cat([model.logits(p).argmax(1) for p in ahead.split(CHUNK_TOKENS)])
        for start in range(0, len(hidden), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            labels = batch.labels[0, part]
            valid = labels != IGNORE_INDEX
            scores = model.logits(hidden[part]).float().log_softmax(1)
            picked = scores.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
            nats -= (picked * valid).sum().item()
            hits += ((scores.argmax(1) == labels) & valid).sum().item()
            count += int(valid.sum())
            if drafts is not None:
                # The draft made at i is about the token at i + 2: the main row i + 1 judges it.
                rows = torch.arange(start, start + len(labels), device=model.device)
                made = drafts[(rows - 1).clamp(min=0)]
                inside = (batch.packed.positions[part] >= 1) & valid
                agree += ((scores.argmax(1) == made) & inside).sum().item()
                chance = scores.gather(1, made.unsqueeze(1)).squeeze(1).exp()
                accept += (chance * inside).sum().item()
                right += ((labels == made) & inside).sum().item()
                places += int(inside.sum())
    model.train(was_training)
    num_bytes = sum(part.num_bytes for part in shards) * count / max(total, 1)
    has = model.mtp is not None and places
    return Evaluation(
        loss=nats / max(count, 1),
        bits_per_byte=nats / math.log(2) / max(num_bytes, 1),
        accuracy=hits / max(count, 1),
        draft_agreement=agree / places if has else None,
        draft_acceptance=accept / places if has else None,
        draft_accuracy=right / places if has else None,
        tokens=count,
    )
