"""StatePool: whose state lies in which slot, at which position.

A slot is free or has one owner: a running sequence, a snapshot, or a snapshot still to be written.
The owner says its slot and position, so a state cannot be attached where it does not belong.
"""

from __future__ import annotations

import heapq
from itertools import count

from qnext.engine.cache.entries import Lease, Plan, Snapshot
from qnext.errors import EngineError


class StatePool:
    """Owners of slots 0..num_slots-1, and which snapshot goes first.

    Args:
        num_slots: how many there are.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.owners: list[Lease | Plan | Snapshot | None] = [None] * num_slots
        self.free = list(range(num_slots - 1, -1, -1))
        self.num_snapshots = 0
        self._heap: list[tuple[float, int, Snapshot]] = []
        self._serial = count()

    @property
    def num_available(self) -> int:
        """Slots that a sequence can have now: free ones, and snapshots to evict."""
        return len(self.free) + self.num_snapshots

    def give(self, slot: int, owner: Lease | Plan | Snapshot) -> None:
        """Make ``owner`` the owner of a slot that nobody else keeps."""
        if isinstance(self.owners[slot], Snapshot):
            self.num_snapshots -= 1
        self.owners[slot] = owner
        owner.slot = slot
        if isinstance(owner, Snapshot):
            self.num_snapshots += 1
            self._push(owner)

    def release(self, slot: int) -> None:
        """Free a slot."""
        owner = self.owners[slot]
        if owner is None:
            raise EngineError(f"state slot {slot} is freed twice")
        if isinstance(owner, Snapshot):
            self.num_snapshots -= 1
        owner.slot = -1
        self.owners[slot] = None
        self.free.append(slot)

    def touch(self, snapshot: Snapshot, now: float) -> None:
        """Note a use."""
        snapshot.score = now + snapshot.worth
        self._push(snapshot)

    def victim(self) -> Snapshot | None:
        """The snapshot to evict next."""
        heap = self._heap
        while heap:
            score, _, snapshot = heap[0]
            if snapshot.slot >= 0 and snapshot.score == score:
                return snapshot
            heapq.heappop(heap)
        return None

    def _push(self, snapshot: Snapshot) -> None:
        if len(self._heap) > 4 * self.num_slots + 64:
            alive = [owner for owner in self.owners if isinstance(owner, Snapshot)]
            self._heap = [(s.score, next(self._serial), s) for s in alive if s is not snapshot]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (snapshot.score, next(self._serial), snapshot))
