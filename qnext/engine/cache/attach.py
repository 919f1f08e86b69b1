"""Attach: a new sequence gets the longest cached prefix of its tokens, from wherever it lies."""

from __future__ import annotations

from qnext.engine.cache.entries import Lease, Node, Snapshot
from qnext.engine.cache.memory import Memory
from qnext.engine.cache.policy import WORTH
from qnext.engine.cache.saves import Saves
from qnext.engine.cache.spill import TierChain, block_name
from qnext.engine.cache.stats import CacheStats
from qnext.errors import EngineError


class Attach:
    """Restores prefixes.

    Args:
        memory: where they lie.
        saves: publishes what a tier gave.
        stats: counts the tiers' hits.
        needs_state: whether blocks are of no use without a state.
    """

    def __init__(
        self, memory: Memory, saves: Saves, stats: CacheStats, *, needs_state: bool
    ) -> None:
        self.memory, self.saves, self.stats = memory, saves, stats
        self.needs_state = needs_state

    def longest(self, lease: Lease, path: list[Node], limit: int) -> None:
        """Give a new lease table, slot and position of its longest usable prefix, or nothing.

        Args:
            lease: holds nothing yet.
            path: the known nodes along its tokens, the root first.
            limit: most tokens.
        """
        memory, size = self.memory, lease.block_size
        if not self.needs_state:
            # No stored hidden state: at least one token has to be run.
            limit = min(limit, len(lease.tokens) - 1)
        if memory.tiers is not None and self._fetch(lease, path, limit, memory.tiers):
            return
        if not self.needs_state:
            memory.share(lease, (node.block for node in path[1 : limit // size + 1]))
            lease.position = len(lease.table) * size
            return
        for snapshot in memory.index.snapshots(path, lease.tokens, limit):
            full = snapshot.node.end // size
            memory.share(lease, (node.block for node in path[1 : full + 1]))
            if snapshot.block is None or memory.copy_tail(lease, snapshot.block):
                self._restore(lease, snapshot)
                return
            if not memory.blocks.refs[snapshot.block]:
                self._take_over(lease, snapshot, snapshot.block)
                return
            memory.release_table(lease)

    def _restore(self, lease: Lease, snapshot: Snapshot) -> None:
        """Give a lease the state of a snapshot: a copy, or the slot itself if no other is left."""
        states, index = self.memory.states, self.memory.index
        room = len(lease.table) * lease.block_size
        found = states.owners[snapshot.slot]
        if found is not snapshot or not room - lease.block_size < snapshot.position <= room:
            raise EngineError(
                f"the state in slot {snapshot.slot} is not the one after {snapshot.position} tokens"
            )
        snapshot.worth = max(snapshot.worth, WORTH)  # it proved useful
        states.touch(snapshot, index.now)
        lease.position = snapshot.position
        if not states.free and states.victim() is snapshot:
            index.evict_snapshot(snapshot)
            states.give(states.free.pop(), lease)
            return
        lease.attached = snapshot
        self.memory.seat(lease)
        self.memory.tensors.copy_slot(snapshot.slot, lease.slot)

    def _take_over(self, lease: Lease, snapshot: Snapshot, block: int) -> None:
        """No block is left for a copy of the tail: the lease gets the snapshot itself."""
        states, slot = self.memory.states, snapshot.slot
        self.memory.share(lease, [block])
        self.memory.index.evict(block)
        states.free.remove(slot)
        states.give(slot, lease)
        lease.position = snapshot.position

    # ------------------------------------------------------------ from a tier

    def _fetch(self, lease: Lease, path: list[Node], limit: int, tiers: TierChain) -> bool:
        """Complete a prefix that is longer than the device's from the tiers."""
        memory, size = self.memory, lease.block_size
        known = min(len(path) - 1, limit // size)
        above = known * size
        if self.needs_state:
            best = next(memory.index.snapshots(path, lease.tokens, limit), None)
            above = 0 if best is None else best.position
        for position, name in tiers.longer(lease, known, limit, above):
            full = position // size
            memory.share(lease, (node.block for node in path[1 : full + 1]))
            if self._fetch_blocks(lease, full, tiers) and (
                not name or self._fetch_state(lease, name, tiers)
            ):
                lease.position, lease.source = position, name
                self.stats.tier_hits += 1
                self.stats.tier_tokens_hit += position - above
                if name:
                    self._keep(lease)
                return True
            memory.release_table(lease)
        return False

    def _fetch_blocks(self, lease: Lease, full: int, tiers: TierChain) -> bool:
        """Extend a lease's table to ``full`` blocks; those that come are known from now on."""
        memory, index = self.memory, self.memory.index
        for place in range(len(lease.table), full):
            key = lease.key(place + 1)
            rows = tiers.get(block_name(key))
            taken = memory.take_blocks(1) if rows is not None else []
            if rows is None or not taken:
                return False
            memory.tensors.write_block(taken[0], rows)
            lease.table += taken
            parent = index.nodes[lease.key(place)] if place else lease.root
            index.insert(parent, key, taken[0]).spilled = True
        return True

    def _fetch_state(self, lease: Lease, name: str, tiers: TierChain) -> bool:
        """Give a lease a slot and, for a tail, a block with what a tier has."""
        found = tiers.state(name)
        if found is None:
            return False
        state, tail = found
        if tail:
            taken = self.memory.take_blocks(1)
            if not taken:
                return False
            self.memory.tensors.write_block(taken[0], tail)
            lease.table += taken
        self.memory.tensors.write_slot(self.memory.seat(lease), state)
        return True

    def _keep(self, lease: Lease) -> None:
        """Have a fetched state on the device for the next one too, if nothing better goes."""
        self.saves.plan(lease, lease.position, WORTH)
        for plan in lease.plans:
            self.memory.tensors.copy_slot(lease.slot, plan.slot)
        self.saves.settle(lease, publish=True)
