"""Counters of one cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class CacheStats:
    """Totals since the cache was built, and how it is used at this moment.

    ``queries`` are begun sequences (again after a preemption), ``hits`` those that got a cached
    prefix; ``tier_`` counts those that a lower tier made longer, and by how much. ``used`` is what
    running sequences hold, ``cached`` what can be evicted.
    """

    queries: int = 0
    hits: int = 0
    tokens_queried: int = 0
    tokens_hit: int = 0
    tier_hits: int = 0
    tier_tokens_hit: int = 0
    evicted_blocks: int = 0
    evicted_snapshots: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_free: int = 0
    slots_used: int = 0
    slots_cached: int = 0
    slots_free: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Share of the tokens asked for that were cached; None before the first query."""
        return self.tokens_hit / self.tokens_queried if self.tokens_queried else None
