"""What sampling remembers of one sequence: what was asked, what came out, what must come next.

Plain values only; tensors belong to the sampler, which reads states lazily (row_plan.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntFlag, auto
from typing import Literal, NamedTuple

import numpy as np
import torch

from qnext.engine.constraint import ANYTHING, Constraint, Rule
from qnext.engine.grammar import Grammar
from qnext.engine.sampling_params import SamplingParams
from qnext.engine.thinking import ThinkTokens
from qnext.engine.uniform import streams, uniforms

Kind = Literal["greedy", "plain", "top_k", "sorted"]


class Trait(IntFlag):
    """What a sequence asks for beyond a plain draw."""

    EACH_STEP = auto()  # the host has to look at it before every token
    PENALISED = auto()
    BIASED = auto()
    LIMITED = auto()
    LOGPROBS = auto()


CHANGES = Trait.EACH_STEP | Trait.PENALISED | Trait.BIASED | Trait.LIMITED
"""Traits that change logits."""


class Row(NamedTuple):
    """One row of logits: whose it is and which drafts stand between its output and this row."""

    state: SamplingState
    drafts: Sequence[int] = ()


class SamplingState:
    """What sampling remembers of one sequence.

    Args:
        params: the request's parameters.
        prompt_ids: the prompt, for the repetition penalty and to see an open think block.
        stop_ids: ids that would end this sequence, masked until ``min_tokens``.
        vocab_size: V, ids that may be sampled; rows above are padding.
        seed: of this sequence alone.
        bad_words: token sequences never completed.
        device: not used; tensors are made where the logits are.
        grammar: of the answer, at its beginning.
        thinking: ids around think blocks.
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
        grammar: Grammar | None = None,
        thinking: ThinkTokens | None = None,
    ) -> None:
        self.params = params
        self.prompt_ids = prompt_ids
        self.output_ids: list[int] = []
        self.bad_words = [tuple(word) for word in bad_words]
        self.stop_ids = tuple(sorted(stop_ids))
        self.stream = int(streams(np.array([seed & (2**64 - 1)], np.uint64))[0])
        kind = _kind(params)
        # A power of two that neighbours cannot change, so that sums keep their order.
        width = max(32, 1 << (params.top_k - 1).bit_length()) if kind == "top_k" else 0
        self.kind: tuple[Kind, int] = kind, width
        """How it is drawn, and from how many of the likeliest tokens at most (0: all)."""
        self.constraint = Constraint.of(
            grammar,
            thinking,
            params.max_thinking_tokens,
            prompt_ids=prompt_ids,
            end_ids=self.stop_ids,
            vocab_size=vocab_size,
        )
        self.traits = int(_traits(params, self))
        self.plain_greedy = params.greedy and not self.traits
        self.columns = (params.temperature, params.top_p, params.min_p, float(params.top_k))
        """Numbers of the draw, for row_plan.py."""
        self.must_end = False
        """Whether the last token ended the grammar, so that ``min_tokens`` has no say."""
        self.processor_error: str | None = None

    @property
    def failure(self) -> str | None:
        """Why no token could be sampled, where this sequence itself knows."""
        if self.processor_error is not None:
            return self.processor_error
        error = self.constraint.error if self.constraint is not None else None
        return f"the grammar gave up: {error}" if error else None

    def rule(self, drafts: Sequence[int] = ()) -> Rule:
        """What may follow ``drafts`` after the output."""
        return (
            ANYTHING if self.constraint is None else self.constraint.rule(self.output_ids, drafts)
        )

    def append(self, token: int) -> None:
        """Record an emitted token."""
        if self.constraint is not None and self.params.min_tokens and token in self.stop_ids:
            self.must_end = self.rule().only_end
        self.output_ids.append(token)

    def draw(self, ahead: int) -> float:
        """The uniform number in [0, 1) of the token ``ahead`` places after the output."""
        index = np.array([len(self.output_ids) + ahead], np.int64)
        return float(uniforms(np.array([self.stream], np.uint64), index)[0])


def _traits(params: SamplingParams, state: SamplingState) -> Trait:
    found = Trait(0)
    if (
        state.bad_words
        or (params.min_tokens and state.stop_ids)
        or state.constraint
        or params.logits_processors
    ):
        found |= Trait.EACH_STEP
    if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
        found |= Trait.PENALISED
    if params.logit_bias:
        found |= Trait.BIASED
    if params.allowed_token_ids is not None:
        found |= Trait.LIMITED
    if params.logprobs is not None:
        found |= Trait.LOGPROBS
    return found


def _kind(params: SamplingParams) -> Kind:
    if params.greedy:
        return "greedy"
    if params.top_k:
        return "top_k"
    return "sorted" if params.top_p < 1 or params.min_p > 0 else "plain"
