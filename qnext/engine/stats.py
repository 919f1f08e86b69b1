"""Counters of one engine: what CLI and benchmarks read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class EngineStats:
    """Totals since the engine was built; times in seconds of forward, sampling and bookkeeping.

    ``num_drafted[i]`` and ``num_accepted[i]`` count drafts at position ``i`` of a step and how
    many of them were emitted.
    """

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_prefill_steps: int = 0
    num_decode_steps: int = 0
    num_recomputed: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_drafted: list[int] = field(default_factory=list)
    num_accepted: list[int] = field(default_factory=list)

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


def count_drafts(drafted: list[int], accepted: list[int], num_drafted: int, kept: int) -> None:
    """Add one verification of ``num_drafted`` drafts, the first ``kept`` of which were emitted."""
    missing: Sequence[int] = [0] * (num_drafted - len(drafted))
    drafted.extend(missing)
    accepted.extend(missing)
    for place in range(num_drafted):
        drafted[place] += 1
        accepted[place] += place < kept
