"""Request: what was asked. Sequence: one completion of it, from prompt to last token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from qnext.engine.grammar import Grammar
from qnext.engine.outputs import (
    FinishReason,
    Logprob,
    LogprobsAtStep,
    RequestMetrics,
    StreamDelta,
)
from qnext.engine.sampler import RawLogprobs
from qnext.engine.sampling_params import SamplingParams
from qnext.engine.sampling_state import Row, SamplingState
from qnext.engine.thinking import ThinkTokens

if TYPE_CHECKING:
    from qnext.engine.cache import SwappedState
    from qnext.engine.text_stream import TextStream


@dataclass(frozen=True, slots=True)
class RequestText:
    """How a request's tokens become text; the defaults leave them ids.

    Attributes:
        new_stream: makes the incremental text of one sequence.
        decode_token: one id to its text, for logprobs.
        bad_words: token ids of ``params.bad_words``.
        grammar: compiled ``params.structured_outputs``.
        thinking: the ids around think blocks.
    """

    new_stream: Callable[[], TextStream] | None = None
    decode_token: Callable[[int], str] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: Grammar | None = None
    thinking: ThinkTokens | None = None


@dataclass(eq=False, slots=True)
class Request:
    """One prompt with its parameters and ``params.n`` sequences."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    text: RequestText
    order: int = 0
    salt: bytes = b""
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[LogprobsAtStep | None] | None = None

    def start(
        self,
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        max_model_len: int,
        seed: int,
        device: torch.device | str,
        first_id: int = 0,
    ) -> None:
        """Make the ``n`` sequences; sequence i draws its samples from ``seed + i``."""
        params, prompt = self.params, self.prompt_token_ids
        stops: dict[int, int | None] = {token: token for token in params.stop_token_ids}
        if not params.ignore_eos:
            stops |= dict.fromkeys(eos_token_ids)
        total = max_model_len
        if params.max_tokens is not None:
            total = min(total, len(prompt) + params.max_tokens)
        for index in range(params.n):
            sampling = SamplingState(
                params,
                prompt_ids=prompt,
                stop_ids=[token for token in stops if token < vocab_size],
                vocab_size=vocab_size,
                seed=seed + index,
                bad_words=self.text.bad_words,
                device=device,
                grammar=self.text.grammar,
                thinking=self.text.thinking,
            )
            sequence = Sequence(
                request=self,
                index=index,
                seq_id=first_id + index,
                order=self.order,
                sampling=sampling,
                tokens=list(prompt),
                num_prompt=len(prompt),
                stop_ids=stops,
                max_total=total,
                text=self.text.new_stream() if self.text.new_stream else None,
                logprobs=None if params.logprobs is None else [],
            )
            self.sequences.append(sequence)

    @property
    def needs_every_row(self) -> bool:
        """Whether the prompt's own logits are wanted, so that none of it may come from a cache."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) == 1

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    def logprobs_dict(self, raw: RawLogprobs) -> LogprobsAtStep:
        """VLLM's dict of one step."""
        decode = self.text.decode_token
        return {
            token: Logprob(logprob, rank, decode(token) if decode else None)
            for token, logprob, rank in zip(*raw, strict=True)
        }


@dataclass(eq=False, slots=True)
class Sequence:
    """One completion in the making.

    Attributes:
        tokens: prompt and output so far.
        stop_ids: ids that end it, each with the ``stop_reason`` it gives.
        max_total: most tokens, prompt included.
        row: how its next token is sampled.
        seq_id: name of the sequence in the cache.
        order: place in the queue (scheduler.py).
        num_computed: tokens the cache holds; the rest are the next input.
        reserved: tokens for which there are blocks.
        is_running: whether it has a slot.
        committed: tokens that the cache was last told of.
        poisoned: a number in its cache may not be finite.
        lead: it was attached to a cached prefix, and the MTP row there is still to be made.
        swapped: its blocks and state on the host, while it waits.
        drafts: proposed continuation of ``tokens``, to be verified in the next step.
        text: incremental text, None when nobody needs it before the end.
    """

    request: Request
    index: int
    sampling: SamplingState
    tokens: list[int]
    num_prompt: int
    stop_ids: dict[int, int | None]
    max_total: int
    row: Row = field(init=False)
    seq_id: int = 0
    order: int = 0
    text: TextStream | None = None
    num_computed: int = 0
    reserved: int = 0
    is_running: bool = False
    lead: bool = False
    committed: int = 0
    poisoned: bool = False
    swapped: SwappedState | None = None
    drafts: list[int] = field(default_factory=list)
    logprobs: list[LogprobsAtStep] | None = None
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self.row = Row(self.sampling)

    @property
    def output_ids(self) -> list[int]:
        """Generated ids."""
        return self.sampling.output_ids

    def forget(self) -> None:
        """Its cache is gone: everything is to be run again."""
        self.num_computed, self.committed, self.reserved = 0, 0, 0
        self.drafts, self.lead = [], False
        if self.request.prompt_logprobs is not None and not self.output_ids:
            self.request.prompt_logprobs = [None]

    def finish(
        self, reason: FinishReason, *, stop: str | int | None = None, error: str | None = None
    ) -> None:
        """End the sequence; the first reason stays."""
        if self.finish_reason is None:
            self.finish_reason, self.stop_reason, self.error = reason, stop, error
            self.drafts = []
            if self.text is not None:
                self.text.finish()

    def append(self, token: int, raw: RawLogprobs | None) -> None:
        """Add a sampled token and decide whether it is the last."""
        self.tokens.append(token)
        self.sampling.append(token)
        if raw is not None and self.logprobs is not None:
            self.logprobs.append(self.request.logprobs_dict(raw))
            self.cumulative_logprob += raw.logprobs[0]
        may_stop = len(self.sampling.output_ids) >= self.request.params.min_tokens
        stops = token in self.stop_ids and (may_stop or self.sampling.must_end)
        if self.text is not None:
            found = self.text.push(token, stops=stops, may_stop=may_stop)
            if found is not None:
                self.finish("stop", stop=found)
        if stops:
            self.finish("stop", stop=self.stop_ids[token])
        elif len(self.tokens) >= self.max_total:
            self.finish("length")


def news(sequence: Sequence, ids: int, pieces: int) -> tuple[StreamDelta | None, tuple[int, int]]:
    """What a sequence gained since ``ids`` tokens and ``pieces`` pieces of text were sent."""
    new_ids = sequence.output_ids[ids:]
    new_pieces = sequence.text.pieces[pieces:] if sequence.text else []
    after = (ids + len(new_ids), pieces + len(new_pieces))
    if not new_ids and not new_pieces and sequence.finish_reason is None:
        return None, after
    delta = StreamDelta(
        text="".join(new_pieces),
        token_ids=new_ids,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        index=sequence.index,
        logprobs=None if sequence.logprobs is None else sequence.logprobs[ids : after[0]],
        error=sequence.error,
    )
    return delta, after
