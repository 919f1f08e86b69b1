"""Sampling by the book, a row at a time, in Python floats: what the sampler must agree with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

MASK = 2**64 - 1


def uniform(seed: int, index: int) -> float:
    """SplitMix64 in Python integers."""

    def mixed(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    gamma = 0x9E3779B97F4A7C15
    state = mixed((seed + gamma) & MASK)
    return (mixed((state + (index + 1) * gamma) & MASK) >> 16) / 2**48


def final_logits(
    logits: Sequence[float],
    values: dict[str, Any],
    *,
    prompt: Sequence[int],
    output: Sequence[int],
    stops: Sequence[int] = (),
    bad_words: Sequence[Sequence[int]] = (),
) -> list[float]:
    """Masks, bias and penalties; ``output`` counts drafts too."""
    row = list(logits)
    for token in range(len(row)):
        allowed = values.get("allowed_token_ids")
        if allowed is not None and token not in allowed:
            row[token] = -math.inf
        if len(output) < values.get("min_tokens", 0) and token in stops:
            row[token] = -math.inf
        for *head, last in bad_words:
            if last == token and list(output[len(output) - len(head) :]) == head:
                row[token] = -math.inf
        row[token] += (values.get("logit_bias") or {}).get(token, 0.0)
        penalty = values.get("repetition_penalty", 1.0)
        if token in output or token in prompt:
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        count = list(output).count(token)
        row[token] -= values.get("frequency_penalty", 0.0) * count
        row[token] -= values.get("presence_penalty", 0.0) * (count > 0)
    return row


def distribution(row: Sequence[float], values: dict[str, Any]) -> dict[int, float]:
    """Probabilities in the order in which they are drawn from: by id, or falling where filtered."""
    temperature = values.get("temperature", 1.0)
    best = max(range(len(row)), key=lambda i: row[i])
    if temperature < 1e-5:
        return {best: 1.0}
    top_k, top_p, min_p = (
        values.get("top_k", 0),
        values.get("top_p", 1.0),
        values.get("min_p", 0.0),
    )
    weights = [math.exp((x - row[best]) / temperature) for x in row]
    if not top_k and top_p == 1 and not min_p:
        order = list(range(len(row)))
    else:
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    kept = order[: top_k or len(order)]
    kept = [i for i in kept if weights[i] >= min_p]
    total = sum(weights[i] for i in kept)
    if top_p < 1:
        before = [0.0, *itertools.accumulate(weights[i] / total for i in kept)]
        kept = [i for i, share in zip(kept, before, strict=False) if share < top_p]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


def drawn(probabilities: dict[int, float], number: float) -> tuple[int, float]:
    """The token at ``number`` of the running sum, and how far the nearest border is."""
    running, found, distance = 0.0, -1, 1.0
    for token, share in probabilities.items():
        running += share
        distance = min(distance, abs(running - number))
        if found < 0 and running > number:
            found = token
    return (found if found >= 0 else next(reversed(probabilities))), distance
