"""Counters and times of one engine: the one object that CLI, benchmarks and server read."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qnext.engine.outputs import RequestMetrics

_RECENT = 4096
"""Samples that percentiles are taken from."""


@dataclass(slots=True)
class Series:
    """Seconds measured many times: count and sum of all, the most recent ones for percentiles."""

    count: int = 0
    total: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def add(self, seconds: float) -> None:
        """Record one."""
        self.count += 1
        self.total += seconds
        self.recent.append(seconds)

    @property
    def mean(self) -> float | None:
        """Of all."""
        return self.total / self.count if self.count else None

    def percentile(self, share: float) -> float | None:
        """Value below which ``share`` (0..1) of the recent ones lie."""
        if not self.recent:
            return None
        ordered = sorted(self.recent)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def summary(self) -> dict[str, float | int | None]:
        """Count, mean, median, 99th percentile."""
        return {
            "count": self.count,
            "mean": self.mean,
            "p50": self.percentile(0.5),
            "p99": self.percentile(0.99),
        }


@dataclass(slots=True)
class EngineStats:
    """Totals since the engine was built; times in seconds.

    ``prefill_seconds`` and ``decode_seconds`` are those of steps with and without prompt pieces,
    with sampling and bookkeeping; ``schedule_seconds`` is their share before the forward.
    ``num_drafted[i]`` and ``num_accepted[i]`` count drafts at position ``i`` of a step and how
    many of them were emitted.
    """

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_failed: int = 0
    num_prefill_steps: int = 0
    num_decode_steps: int = 0
    num_recomputed: int = 0
    num_preempted: int = 0
    num_swapped: int = 0
    num_running: int = 0
    num_waiting: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    schedule_seconds: float = 0.0
    num_drafted: list[int] = field(default_factory=list)
    num_accepted: list[int] = field(default_factory=list)
    time_to_first_token: Series = field(default_factory=Series)
    time_per_output_token: Series = field(default_factory=Series)
    inter_token: Series = field(default_factory=Series)
    queue_time: Series = field(default_factory=Series)

    @property
    def num_steps(self) -> int:
        """Steps so far."""
        return self.num_prefill_steps + self.num_decode_steps

    @property
    def hit_rate(self) -> float | None:
        """Share of the prompt tokens that came from the prefix cache."""
        return self.num_cached_tokens / self.num_prompt_tokens if self.num_prompt_tokens else None

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of the drafts at each position that was emitted."""
        pairs = zip(self.num_accepted, self.num_drafted, strict=True)
        return [accepted / drafted for accepted, drafted in pairs]

    @property
    def tokens_per_step(self) -> float | None:
        """Generated tokens per decode step and sequence; 1 without speculation."""
        if not self.num_drafted or not self.num_drafted[0]:
            return None
        return 1 + sum(self.num_accepted) / self.num_drafted[0]

    def finished(self, metrics: RequestMetrics, reason: str | None) -> None:
        """Take over the times of a request that has ended."""
        self.num_finished += 1
        self.num_aborted += reason == "abort"
        self.num_failed += reason == "error"
        for series, value in (
            (self.time_to_first_token, metrics.time_to_first_token),
            (self.time_per_output_token, metrics.time_per_output_token),
            (self.queue_time, metrics.queue_time),
        ):
            if value is not None:
                series.add(value)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        found: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            found[name] = value.summary() if isinstance(value, Series) else value
        found["hit_rate"] = self.hit_rate
        found["acceptance_per_position"] = self.acceptance_per_position
        return found


def count_drafts(drafted: list[int], accepted: list[int], num_drafted: int, kept: int) -> None:
    """Add one verification of ``num_drafted`` drafts, the first ``kept`` of which were emitted."""
    missing: Sequence[int] = [0] * (num_drafted - len(drafted))
    drafted.extend(missing)
    accepted.extend(missing)
    for place in range(num_drafted):
        drafted[place] += 1
        accepted[place] += place < kept
