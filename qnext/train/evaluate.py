"""Held-out loss, bits per byte, and how often the first MTP draft would be accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest

import torch
import torch.distributed as dist

from qnext.parallel import Mesh
from qnext.train.data import Documents, heldout_batches
from qnext.train.loss import Objective


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
    objective: Objective,
    shards: Sequence[Documents],
    seq_len: int,
    tokens: int,
    mesh: Mesh | None = None,
) -> Evaluation:
    """Score every held-out document once, in sequences of at most ``seq_len`` tokens.

    The first token of each sequence is not predicted; bits per byte divide by all bytes scaled
    by the share of tokens that are predicted. Data-parallel ranks share the batches.

    Args:
        objective: holds the model; its losses play no role.
        shards: what to score.
        seq_len: tokens of the longest sequence.
        tokens: of a batch, about.
        mesh: the ranks, if there are several; all must call.
    """
    model = objective.model
    was_training = model.training
    model.eval()
    part, parts = mesh.place("data") if mesh is not None else (0, 1)
    device = mesh.device if mesh is not None else model.device
    batches = (b for one in shards for b in heldout_batches(one, tokens, seq_len, 1))
    sums = torch.zeros(8, dtype=torch.float64, device=device)
    for group in zip_longest(*[batches] * parts):
        # Every rank makes every forward pass, a collective; those without a batch count nothing.
        batch = group[part] if group[part] is not None else group[0]
        batch = batch.to(device)
        if mesh is not None:
            batch = batch.cut(*mesh.place("context"))
        found = objective.score(batch)
        sums += found * (group[part] is not None)
    if mesh is not None:
        dist.all_reduce(sums)
    model.train(was_training)
    nats, hits, count, agree, accept, right, places, total = sums.tolist()
    num_bytes = sum(one.num_bytes for one in shards) * count / max(total, 1)
    has = model.mtp is not None and places
    return Evaluation(
        loss=nats / max(count, 1),
        bits_per_byte=nats / math.log(2) / max(num_bytes, 1),
        accuracy=hits / max(count, 1),
        draft_agreement=agree / places if has else None,
        draft_acceptance=accept / places if has else None,
        draft_accuracy=right / places if has else None,
        tokens=int(count),
    )
