"""Logits to tokens: every row with its own parameters, penalties and random numbers.

A row's draw uses one uniform number of its own sequence and the inverse of its cumulative
distribution, so that neither its neighbours nor speculation (speculative.py) change its samples.
filters.py has the order of operations. Log-probabilities are of the raw logits, as in vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.engine.filters import column, filtered, groups_of, process_logits
from qnext.engine.sampling_state import Row

_NEVER = -1e30
"""Logit of ids without a token: probability exactly 0."""


class RawLogprobs(NamedTuple):
    """Numbers behind vLLM's dict of one step: ids, log-probabilities (nats), 1-based ranks."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


@dataclass(slots=True)
class Sampled:
    """Per row: the token, whether it is valid, and its logprobs if asked for.

    A token is not valid when a logit is not finite or when no token is allowed.
    """

    tokens: list[int]
    valid: list[bool]
    logprobs: list[RawLogprobs | None]


def probs(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """The exact distribution (R, V) fp32 that each row is sampled from, after all processing."""
    logits = process_logits(logits.float(), rows)
    result = torch.zeros_like(logits)
    for members, kind in groups_of(rows):
        index = torch.tensor(members, device=logits.device)
        part = logits[index]
        params = [rows[i].state.params for i in members]
        if kind == "greedy":
            result[index, argmax(part)] = 1
        elif kind == "plain":
            result[index] = torch.softmax(part / column("temperature", params, part), -1)
        else:
            for some, weights, ids in filtered(part, params):
                weights = weights / weights.sum(-1, keepdim=True)
                result[index[some]] = torch.zeros_like(part[some]).scatter_(1, ids, weights)
    return result


class Sampler:
    """Samples every row of a batch.

    Args:
        vocab_size: V, ids that may be sampled: columns from V on are padding and are cut off.
        unused_ids: ids below V that no token has.
    """

    def __init__(self, vocab_size: int, unused_ids: Sequence[int] = ()) -> None:
        self.vocab_size = vocab_size
        self._unused: Tensor | None = None
        if unused_ids:
            self._unused = torch.tensor(unused_ids, dtype=torch.long)

    def __call__(self, logits: Tensor, rows: Sequence[Row]) -> Sampled:
        """Tokens for ``logits`` (R, >= V) of any dtype; ``rows`` has R entries."""
        logits = logits[:, : self.vocab_size].float()
        if self._unused is not None:  # finite, so that a sum still tells damaged rows
            self._unused = self._unused.to(logits.device)
            logits = logits.index_fill(1, self._unused, _NEVER)
        if all(row.state.plain_greedy for row in rows):
            return self._greedy(logits)
        valid = torch.isfinite(logits.sum(-1))
        final = process_logits(logits, rows)
        if final is not logits:  # every token of a row may have been forbidden
            valid &= final.amax(-1) > -torch.inf
        groups = groups_of(rows)
        if len(groups) == 1:
            tokens = _pick(final, rows, groups[0][1])
        else:
            tokens = torch.empty(len(rows), dtype=torch.long, device=logits.device)
            for members, kind in groups:
                index = torch.tensor(members, device=logits.device)
                tokens[index] = _pick(final[index], [rows[i] for i in members], kind)
        return Sampled(tokens.tolist(), valid.tolist(), self._logprobs(logits, tokens, rows))

    def _greedy(self, logits: Tensor) -> Sampled:
        """Nothing but the most likely token; the sum is finite only if every logit is."""
        both = torch.stack([argmax(logits).double(), logits.sum(-1).double()])
        tokens, sums = both.tolist()  # one transfer; float64 holds ids exactly
        return Sampled(
            [int(t) for t in tokens], [math.isfinite(x) for x in sums], [None] * len(sums)
        )

    @staticmethod
    def _logprobs(raw: Tensor, tokens: Tensor, rows: Sequence[Row]) -> list[RawLogprobs | None]:
        wanted = [row.state.params.logprobs for row in rows]
        members = [i for i, count in enumerate(wanted) if count is not None]
        result: list[RawLogprobs | None] = [None] * len(rows)
        if members:
            counts = [wanted[i] or 0 for i in members]
            for i, found in zip(
                members, top_logprobs(raw[members], tokens[members], counts), strict=True
            ):
                result[i] = found
        return result


def argmax(logits: Tensor) -> Tensor:
    """Index (R,) of the largest of each row (R, V) fp32, the first of equals.

    On a CPU NumPy's is vectorised and torch's (2.13) is not: 2.5 against 28 us for 16,384 logits.
    """
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def top_logprobs(logits: Tensor, chosen: Tensor, counts: Sequence[int]) -> list[RawLogprobs]:
    """Log-probabilities of the chosen tokens and of the most likely ones.

    Args:
        logits: (R, V) raw.
        chosen: (R,) token ids.
        counts: R numbers of most likely tokens, -1 for the whole vocabulary.

    Returns:
        per row the chosen token first, then the most likely ones; a chosen token that is among
        them is not repeated.
    """
    values = torch.log_softmax(logits.float(), -1)
    own = values.gather(1, chosen[:, None])
    ranks = (values > own).sum(-1).add_(1).tolist()
    vocab = logits.shape[1]
    counts = [vocab if count < 0 else min(count, vocab) for count in counts]
    top = values.topk(max(counts), -1)
    columns = (chosen.tolist(), own[:, 0].tolist(), ranks, counts)
    result = []
    for token, value, rank, count, top_values, top_ids in zip(
        *columns, top.values.tolist(), top.indices.tolist(), strict=True
    ):
        ids, logprobs, positions = [token], [value], [rank]
        for place in range(count):
            if top_ids[place] != token:
                ids.append(top_ids[place])
                logprobs.append(top_values[place])
                positions.append(place + 1)
        result.append(RawLogprobs(ids, logprobs, positions))
    return result


def _pick(logits: Tensor, rows: Sequence[Row], kind: str) -> Tensor:
    """Tokens (r,) for processed logits (r, V) of rows of one kind."""
    if kind == "greedy":
        return argmax(logits)
    params = [row.state.params for row in rows]
    draws = torch.tensor([row.state.draw(len(row.drafts)) for row in rows], dtype=torch.float64).to(
        logits.device
    )
    if kind == "plain":
        return _invert(torch.softmax(logits / column("temperature", params, logits), -1), draws)
    tokens = torch.empty(len(rows), dtype=torch.long, device=logits.device)
    for some, weights, ids in filtered(logits, params):
        whole = len(some) == len(rows)
        picked = _invert(weights, draws if whole else draws[some])
        found = ids.gather(1, picked[:, None])[:, 0]
        if whole:
            return found
        tokens[some] = found
    return tokens


def _invert(weights: Tensor, draws: Tensor) -> Tensor:
    """Index (r,) at which the running sum of ``weights`` (r, K) passes ``draws`` (r,) in [0, 1).

    Exact zeros are never picked: the running sum does not pass anything there. A row that is not
    a distribution gives some index in range.
    """
    running = weights.double().cumsum(-1)
    target = (draws * running[:, -1])[:, None]
    found = torch.searchsorted(running, target, right=True)[:, 0]
    return found.clamp_max(weights.shape[1] - 1)
