"""Needle in a haystack: is a fact that stands far back still known?

Filler text, somewhere in it one sentence with a number, at the end the beginning of that sentence
again. The needle is found if the model's greedy continuation is the number. One forward pass
judges a place: all tokens of the number must be the arg-max, given those before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from qnext.errors import RequestError
from qnext.layers.model import CausalLM
from qnext.layers.packed import PackedBatch
from qnext.text import Tokenizer

FILLER = (
    "The river runs past the mill and on to the sea. In spring the water is high, and the boats "
    "come up from the coast with salt and cloth. In autumn they go back with grain. The miller "
    "keeps a book of all that passes, and his daughter writes the dates beside it. "
)
FACT = " The secret number of {name} is {value}."
NAMES = ("Amsterdam", "Boston", "Cairo", "Delhi", "Edinburgh", "Florence", "Geneva", "Helsinki")


@dataclass(frozen=True)
class Place:
    """What came out for one length and depth.

    Attributes:
        length: tokens of the whole prompt with its answer, at most.
        depth: where the needle stands, 0 the beginning, 1 the end.
        found: share of the trials in which the number is continued greedily.
        nats: mean negative log-likelihood of the number, nats per token.
    """

    length: int
    depth: float
    found: float
    nats: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@torch.no_grad()
def find_needles(
    model: CausalLM,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: int = 4,
    filler: str = FILLER,
    seed: int = 0,
) -> list[Place]:
    """Try every length and depth.

    Raises:
        RequestError: a length without room for the needle, or beyond the model's context.
    """
    rng = np.random.default_rng(seed)
    limit = model.config.max_position_embeddings
    hay = tokenizer.encode(filler)
    places = []
    for length in lengths:
        if length > limit:
            raise RequestError(f"needle length {length} is more than the model's context {limit}")
        for depth in depths:
            found, nats = 0, 0.0
            for _ in range(trials):
                ids, answer = _prompt(tokenizer, hay, length, depth, rng)
                hits, loss = _judge(model, ids, answer)
                found, nats = found + hits, nats + loss
            places.append(Place(length, depth, found / trials, nats / trials))
    return places


def _prompt(
    tokenizer: Tokenizer, hay: list[int], length: int, depth: float, rng: np.random.Generator
) -> tuple[list[int], int]:
    """Token ids, and how many of them at the end are the answer."""
    name = NAMES[rng.integers(len(NAMES))]
    value = f" {rng.integers(1000, 9999)}"
    fact = tokenizer.encode(FACT.format(name=name, value=value.strip()))
    stem = tokenizer.encode(FACT.format(name=name, value="").removesuffix(" ."))
    # Encoded together: the answer's tokens are those that follow the stem in the full sentence.
    whole = tokenizer.encode(FACT.format(name=name, value="").removesuffix(" .") + value)
    answer = whole[len(stem) :]
    room = length - len(fact) - len(stem) - len(answer)
    if room < 0:
        raise RequestError(
            f"needle length {length} has no room for the needle of {length - room} tokens"
        )
    straw = [hay[i % len(hay)] for i in range(room)]
    at = round(depth * room)
    return [*straw[:at], *fact, *straw[at:], *stem, *answer], len(answer)


def _judge(model: CausalLM, ids: list[int], answer: int) -> tuple[bool, float]:
    """Whether all answer tokens are the arg-max, and their mean negative log-likelihood."""
    tokens = torch.tensor(ids, device=model.device)
    hidden = model.hidden_states(tokens, PackedBatch.of([len(ids)], device=model.device))
    scores = model.logits(hidden[-answer - 1 : -1]).float().log_softmax(-1)
    want = tokens[-answer:]
    picked = scores.gather(1, want.unsqueeze(1)).squeeze(1)
    return bool((scores.argmax(1) == want).all()), -float(picked.mean())
