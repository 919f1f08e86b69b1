"""How many sequences may be open at once, and who goes before whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from qnext.server.errors import Refusal


class Admission:
    """A bounded queue before the engine: what does not fit is told when to come back.

    Callers are ordered by what they already hold: each ``num_running`` open sequences of a key put
    its next request one step of priority back, so that a key with a long queue does not keep the
    others waiting.

    Args:
        num_running: sequences that the engine runs at once.
        max_queue: sequences that may wait beside them.
    """

    def __init__(self, num_running: int, max_queue: int) -> None:
        self.num_running, self.limit = num_running, num_running + max_queue
        self.num_open = 0
        self.num_rejected = 0
        self._by_key: Counter[str] = Counter()
        self._seconds = 1.0

    @contextmanager
    def enter(self, key: str, count: int) -> Iterator[int]:
        """Room for ``count`` sequences while the block runs; gives the request's priority.

        Raises:
            Refusal: 429, the queue is full.
        """
        if count > self.limit:
            raise Refusal(f"{count} sequences in one request; this server takes {self.limit}")
        if self.num_open + count > self.limit:
            self.num_rejected += 1
            raise Refusal(
                "too many requests are waiting; try again later",
                429,
                code="rate_limit_exceeded",
                retry_after=min(60, max(1, round(self._seconds))),
            )
        priority = self._by_key[key] // self.num_running
        self.num_open += count
        self._by_key[key] += count
        try:
            yield priority
        finally:
            self.num_open -= count
            self._by_key[key] -= count
            if not self._by_key[key]:
                del self._by_key[key]

    def took(self, seconds: float) -> None:
        """Learn how long a request took; ``Retry-After`` is the moving average."""
        self._seconds += 0.1 * (seconds - self._seconds)
