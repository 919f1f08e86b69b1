"""What sampling remembers of one sequence: its random numbers, penalties and masks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.engine.sampling_params import SamplingParams

_DRAW_BITS = 48
"""Draws are multiples of 2^-48 below 1, so draw * total < total in float64."""


class Row(NamedTuple):
    """One row of logits: whose it is and which drafts stand between its output and this row."""

    state: SamplingState
    drafts: Sequence[int] = ()


class SamplingState:
    """What sampling remembers of one sequence.

    Args:
        params: the request's parameters.
        prompt_ids: the prompt, for the repetition penalty.
        stop_ids: ids that would end this sequence, masked until ``min_tokens``.
        vocab_size: V, ids that may be sampled; rows above are padding.
        seed: of this sequence alone.
        bad_words: token sequences never completed.
        device: where the logits are.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_ids: Sequence[int] = (),
        stop_ids: Sequence[int] = (),
        vocab_size: int,
        seed: int = 0,
        bad_words: Sequence[Sequence[int]] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.params = params
        self.output_ids: list[int] = []
        self.bad_words = [tuple(word) for word in bad_words]
        self._random = random.Random(seed & (2**64 - 1))
        self._ahead: list[float] = []
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
        self.bias = _static_bias(params, vocab_size, device)
        self.prompt_seen: Tensor | None = None
        self.counts: Tensor | None = None
        if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
            self.prompt_seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.prompt_seen[torch.tensor(list(prompt_ids), dtype=torch.long, device=device)] = True
            self.counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        self.changes_logits = bool(
            self.bias is not None
            or self.counts is not None
            or self.bad_words
            or (params.min_tokens and len(stop_ids))
        )
        self.plain_greedy = params.greedy and not self.changes_logits and params.logprobs is None

    def append(self, token: int) -> None:
        """Record an emitted token and use up its random number."""
        self.output_ids.append(token)
        if self.counts is not None:
            self.counts[token] += 1
        if self._ahead:
            del self._ahead[0]

    def draw(self, ahead: int) -> float:
        """The uniform number in [0, 1) of the token ``ahead`` places after the output."""
        while len(self._ahead) <= ahead:
            self._ahead.append(self._random.getrandbits(_DRAW_BITS) / 2**_DRAW_BITS)
        return self._ahead[ahead]


def _static_bias(params: SamplingParams, vocab: int, device: torch.device | str) -> Tensor | None:
    """Bias (V,) that never changes: -inf outside ``allowed_token_ids``, plus ``logit_bias``."""
    if params.allowed_token_ids is None and not params.logit_bias:
        return None
    bias = torch.zeros(vocab, dtype=torch.float32)
    if params.allowed_token_ids is not None:
        bias.fill_(-torch.inf)
        bias[list(params.allowed_token_ids)] = 0
    for token, value in (params.logit_bias or {}).items():
        bias[token] += value
    return bias.to(device)
