"""Log-probabilities of the raw logits, as in vLLM: the chosen token, then the likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RawLogprobs(NamedTuple):
    """Numbers behind vLLM's dict of one step: ids, log-probabilities (nats), 1-based ranks."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


def logprob_columns(logits: Tensor, chosen: Tensor, most: int) -> Tensor:
    """Everything that is reported, on the device.

    Args:
        logits: (R, V) raw.
        chosen: (R,) token ids.
        most: how many of the likeliest tokens.

    Returns:
        (R, 3 + 2 * most) float64, which holds ids and fp32 exactly: the chosen id, its value and
        rank, values of the likeliest in falling order, their ids.
    """
    values = torch.log_softmax(logits.float(), -1)
    own = values.gather(1, chosen[:, None])
    ranks = (values > own).sum(-1, keepdim=True) + 1
    top = values.topk(most, -1)
    parts = (chosen[:, None], own, ranks, top.values, top.indices)
    return torch.cat([part.double() for part in parts], 1)


def read_columns(rows: list[list[float]], counts: Sequence[int]) -> list[RawLogprobs]:
    """Rows of `logprob_columns` as values; a chosen token among the likeliest is not repeated."""
    result = []
    for row, count in zip(rows, counts, strict=True):
        most = (len(row) - 3) // 2
        token = int(row[0])
        ids, logprobs, ranks = [token], [row[1]], [int(row[2])]
        for place in range(count):
            other = int(row[3 + most + place])
            if other != token:
                ids.append(other)
                logprobs.append(row[3 + place])
                ranks.append(place + 1)
        result.append(RawLogprobs(ids, logprobs, ranks))
    return result


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
    vocab = logits.shape[1]
    counts = [vocab if count < 0 else min(count, vocab) for count in counts]
    return read_columns(logprob_columns(logits, chosen, max(counts)).tolist(), counts)
