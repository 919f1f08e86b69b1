"""What a request gives back: vLLM's shapes, plus shortcuts to the first completion.

Filled by llm.py from request.py's sequences; holds plain Python values only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability (nats), its 1-based rank in the vocabulary and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


LogprobsAtStep = dict[int, Logprob]
"""Token id -> Logprob: the chosen token first, then the most likely ones."""


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds of ``time.monotonic`` and what speculation did for one request.

    ``num_cached_tokens`` counts prompt tokens that came from the prefix cache. ``num_drafted[i]``
    and ``num_accepted[i]`` count drafts at position ``i`` and how many of them were emitted.
    """

    arrival_time: float = 0.0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    last_token_time: float | None = None
    num_generated_tokens: int = 0
    num_cached_tokens: int | None = None
    num_preemptions: int = 0
    num_drafted: list[int] = field(default_factory=list)
    num_accepted: list[int] = field(default_factory=list)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival until it was first seated."""
        first = self.first_scheduled_time
        return None if first is None else first - self.arrival_time

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds between tokens after the first; None with fewer than two."""
        if self.first_token_time is None or self.last_token_time is None:
            return None
        if self.num_generated_tokens < 2:
            return None
        return (self.last_token_time - self.first_token_time) / (self.num_generated_tokens - 1)

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted share of all drafts, None when nothing was drafted."""
        drafted = sum(self.num_drafted)
        return sum(self.num_accepted) / drafted if drafted else None


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: which of the request's ``n`` completions.
        text: detokenised output, without the stop string unless it was asked for.
        token_ids: every generated id, the stopping one included.
        logprobs: one dict per generated token, when asked for.
        cumulative_logprob: sum over the generated tokens, when logprobs were asked for.
        finish_reason: "stop", "length", "abort" or "error"; None while it runs.
        stop_reason: the stop string or stop token id; None for the model's own end token.
        error: what went wrong, with ``finish_reason == "error"``.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[LogprobsAtStep] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its completions, in order of index."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[LogprobsAtStep | None] | None
    metrics: RequestMetrics
    finished: bool = True

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the first completion."""
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[LogprobsAtStep] | None:
        """Logprobs of the first completion."""
        return self.outputs[0].logprobs

    @property
    def cumulative_logprob(self) -> float | None:
        """Summed log-probability of the first completion."""
        return self.outputs[0].cumulative_logprob

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first completion ended."""
        return self.outputs[0].finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        """What stopped the first completion."""
        return self.outputs[0].stop_reason


@dataclass(frozen=True, slots=True)
class StreamDelta:
    """What one completion gained since the last delta; the last one has a ``finish_reason``."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    index: int = 0
    logprobs: list[LogprobsAtStep] | None = None
    error: str | None = None
