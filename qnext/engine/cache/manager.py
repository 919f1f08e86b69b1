"""CacheManager: the one owner of KV blocks and state slots, and the only door to them.

A sequence begins (with whatever prefix is cached), reserves room, runs, commits what is verified
and finishes. All of it is bookkeeping on the host; tensors move only through ``CacheTensors``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from qnext.engine.cache.blocks import BlockPool
from qnext.engine.cache.check import check_books
from qnext.engine.cache.entries import (
    Lease,
    Node,
    Plan,
    Snapshot,
    SwappedState,
    snapshot_key,
)
from qnext.engine.cache.index import PrefixIndex
from qnext.engine.cache.policy import WORTH, turn_ends, wanted_snapshots
from qnext.engine.cache.spill import TierChain, block_name, state_name
from qnext.engine.cache.states import StatePool
from qnext.engine.cache.stats import CacheStats
from qnext.engine.cache.tensors import CacheTensors
from qnext.engine.cache.tiers import Tier
from qnext.errors import ConfigError, EngineError

_FAR = 1 << 62
"""A boundary that no position reaches."""


class CacheManager:
    """Blocks, slots and the prefix cache of one engine.

    Args:
        tensors: the memory behind the books.
        num_blocks: KV blocks.
        block_size: tokens of a block.
        num_slots: state slots, for running sequences and snapshots together.
        needs_state: whether the model has recurrent layers; without them blocks alone make a hit.
        enable_prefix_caching: off, nothing outlives its sequence.
        fingerprint: everything that changes a state besides tokens and salt: weights, RoPE scaling,
            cache dtype, model config.
        snapshot_interval: save states on a fixed grid besides the useful places, in tokens.
        turn_end_ids: tokens after which a conversation may go on differently.
        tiers: where evicted blocks and states go, the fastest first.
    """

    def __init__(
        self,
        tensors: CacheTensors,
        *,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        needs_state: bool,
        enable_prefix_caching: bool,
        fingerprint: bytes,
        snapshot_interval: int | None = None,
        turn_end_ids: frozenset[int] = frozenset(),
        tiers: Sequence[Tier] = (),
    ) -> None:
        if min(num_blocks, block_size, num_slots) < 1:
            raise ConfigError(
                f"a cache of {num_blocks} blocks of {block_size} tokens and {num_slots} slots is"
                " none at all",
                hint="each of the three must be at least 1",
            )
        if snapshot_interval is not None and snapshot_interval < 1:
            raise ConfigError(f"snapshot_interval={snapshot_interval} must be at least 1")
        self.tensors, self.block_size = tensors, block_size
        self.needs_state, self.enabled = needs_state, enable_prefix_caching
        self.snapshot_interval, self.turn_end_ids = snapshot_interval, turn_end_ids
        self.blocks = BlockPool(num_blocks, lambda block: tensors.zero_blocks([block]))
        self.states = StatePool(num_slots)
        self.tiers: TierChain | None = None
        if tiers and enable_prefix_caching:
            self.tiers = TierChain(tiers, tensors, needs_state=needs_state)
        self.index = PrefixIndex(fingerprint, block_size, self.blocks, self.states, self.tiers)
        self.leases: dict[int, Lease] = {}
        self.planned: dict[bytes, Plan] = {}
        self._stats = CacheStats()

    # ---------------------------------------------------------------- a sequence begins

    def can_ever_fit(self, num_tokens: int) -> bool:
        """Whether a sequence of this length could run alone."""
        return self._num_blocks(num_tokens) <= self.blocks.num_blocks

    def begin(
        self,
        seq_id: int,
        tokens: Sequence[int],
        *,
        salt: bytes = b"",
        max_cached: int | None = None,
    ) -> int | None:
        """Seat a sequence on the longest cached prefix of its tokens.

        Args:
            seq_id: not seated yet.
            tokens: the sequence's own list: tokens may be added while it runs, never changed.
            salt: whatever else its states depend on, such as the adapter.
            max_cached: most tokens to take from the cache; None means all of them, where a stored
                hidden state then gives the logits of the last one.

        Returns:
            tokens whose KV and state it now has, 0 for a clean slot; None if no slot can be had.

        Raises:
            EngineError: ``seq_id`` is seated already.
        """
        if seq_id in self.leases:
            raise EngineError(f"sequence {seq_id} has begun already")
        if not self.states.num_available:
            return None
        self.index.now += 1
        lease = Lease(seq_id, tokens, self.index.root(salt), self.block_size)
        length = len(tokens)
        known = 0
        if self.enabled:
            limit = length if max_cached is None else min(length, max_cached)
            path = self.index.walk(lease, length)
            known = path[-1].end
            self._attach(lease, path, limit)
            self._stats.queries += 1
            self._stats.tokens_queried += length
            self._stats.hits += lease.position > 0
            self._stats.tokens_hit += lease.position
            if self.needs_state:
                ends = turn_ends(tokens, self.turn_end_ids)
                lease.wanted = wanted_snapshots(
                    ends,
                    lease.position,
                    length,
                    block_size=self.block_size,
                    branch=known,
                    interval=self.snapshot_interval,
                )
        if lease.slot < 0:
            self.states.give(self._take_slot(), lease)
            self.tensors.reset_slot(lease.slot)
        lease.hit = lease.position
        lease.registered = lease.position // self.block_size
        self.leases[seq_id] = lease
        return lease.position

    def _attach(self, lease: Lease, path: list[Node], limit: int) -> None:
        """Give a new lease the longest prefix along ``path``, or a longer one from a tier."""
        if self.tiers is not None and self._fetch(lease, path, limit):
            return
        if not self.needs_state:
            # No stored hidden state: at least one token has to be run.
            count = min(limit, len(lease.tokens) - 1) // self.block_size
            self._share(lease, (node.block for node in path[1 : count + 1]))
            lease.position = len(lease.table) * self.block_size
            return
        for snapshot in self.index.snapshots(path, lease.tokens, limit):
            count = snapshot.node.end // self.block_size
            self._share(lease, (node.block for node in path[1 : count + 1]))
            if snapshot.block is None or self._copy_tail(lease, snapshot.block):
                self._restore(lease, snapshot)
                return
            if not self.blocks.refs[snapshot.block]:
                self._take_over(lease, snapshot, snapshot.block)
                return
            self._release_table(lease)

    def _fetch(self, lease: Lease, path: list[Node], limit: int) -> bool:
        """Complete a prefix that is longer than the device's from the tiers."""
        assert self.tiers is not None
        if self.needs_state:
            best = next(self.index.snapshots(path, lease.tokens, limit), None)
            above = 0 if best is None else best.position
        else:
            limit = min(limit, len(lease.tokens) - 1)
            above = min(limit // self.block_size, len(path) - 1) * self.block_size
        known = min(len(path) - 1, limit // self.block_size)
        for position, name in self.tiers.longer(lease, known, limit, above):
            full = position // self.block_size
            self._share(lease, (node.block for node in path[1 : full + 1]))
            if self._fetch_blocks(lease, full) and (not name or self._fetch_state(lease, name)):
                lease.position = position
                lease.source = name
                self._stats.tier_hits += 1
                self._stats.tier_tokens_hit += position - above
                self._keep_fetched(lease)
                return True
            self._release_table(lease)
        return False

    def _fetch_blocks(self, lease: Lease, full: int) -> bool:
        """Extend a lease's table to ``full`` blocks; those that come are known from now on."""
        assert self.tiers is not None
        nodes = self.index.nodes
        for place in range(len(lease.table), full):
            key = lease.key(place + 1)
            if (known := nodes.get(key)) is not None:
                self._share(lease, [known.block])
                continue
            rows = self.tiers.get(block_name(key))
            block = self._take_blocks(1) if rows is not None else []
            if rows is None or not block:
                return False
            self.tensors.write_block(block[0], rows)
            lease.table += block
            parent = nodes[lease.key(place)] if place else lease.root
            self.index.insert(parent, key, block[0]).spilled = True
        return True

    def _fetch_state(self, lease: Lease, name: str) -> bool:
        """Give a lease a slot and, for a tail, a block with what a tier has."""
        assert self.tiers is not None
        found = self.tiers.state(name)
        if found is None:
            return False
        state, tail = found
        if tail:
            block = self._take_blocks(1)
            if not block:
                return False
            self.tensors.write_block(block[0], tail)
            lease.table += block
        self.states.give(self._take_slot(), lease)
        self.tensors.write_slot(lease.slot, state)
        return True

    def _keep_fetched(self, lease: Lease) -> None:
        """Have a fetched state on the device for the next one too, if nothing better goes."""
        if lease.source:
            self._plan(lease, lease.position, WORTH)
            for plan in lease.plans:
                self.tensors.copy_slot(lease.slot, plan.slot)
                del self.planned[plan.key]
                if (snapshot := self._publish(lease, plan, plan.position, WORTH)) is None:
                    self.states.release(plan.slot)
                lease.attached = snapshot
            lease.plans = []

    def _share(self, lease: Lease, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.blocks.share(block)
            lease.table.append(block)

    def _copy_tail(self, lease: Lease, block: int) -> bool:
        """Copy on write: the rows behind a snapshot's last full block become the sequence's own."""
        self.blocks.share(block)
        own = self._take_blocks(1)
        if own:
            self.tensors.copy_block(block, own[0])
            lease.table += own
        self.blocks.release(block)
        return bool(own)

    def _restore(self, lease: Lease, snapshot: Snapshot) -> None:
        """Give a lease the state of a snapshot: a copy, or the slot itself if no other is left."""
        room = len(lease.table) * self.block_size
        found = self.states.owners[snapshot.slot]
        if found is not snapshot or not room - self.block_size < snapshot.position <= room:
            raise EngineError(
                f"the state in slot {snapshot.slot} is not the one after {snapshot.position} tokens"
            )
        snapshot.worth = max(snapshot.worth, WORTH)  # it proved useful
        self.states.touch(snapshot, self.index.now)
        lease.position = snapshot.position
        if not self.states.free and self.states.victim() is snapshot:
            self.index.evict_snapshot(snapshot)
            self.states.give(self.states.free.pop(), lease)
            return
        lease.attached = snapshot
        self.states.give(self._take_slot(), lease)
        self.tensors.copy_slot(snapshot.slot, lease.slot)

    def _take_over(self, lease: Lease, snapshot: Snapshot, block: int) -> None:
        """No block is left for a copy of the tail: the lease gets the snapshot itself."""
        slot = snapshot.slot
        self._share(lease, [block])
        self.index.evict(block)
        self.states.free.remove(slot)
        self.states.give(slot, lease)
        lease.position = snapshot.position

    def fork(self, parent_id: int, child_id: int, tokens: Sequence[int]) -> bool:
        """Seat a sequence on everything that another one has committed.

        Args:
            parent_id: a running sequence.
            child_id: not seated yet.
            tokens: the child's own list; its first ones are those the parent has committed.

        Returns:
            False, with nothing changed, if no slot or no block for the last rows can be had now.
        """
        parent = self._lease(parent_id)
        if child_id in self.leases:
            raise EngineError(f"sequence {child_id} has begun already")
        if not self.states.num_available:
            return False
        position = parent.position
        child = Lease(child_id, tokens, parent.root, self.block_size, position=position)
        child.hit, child.attached = position, parent.attached
        full = position // self.block_size
        self._share(child, parent.table[:full])
        if position % self.block_size and not self._copy_tail(child, parent.table[full]):
            self._release_table(child)
            return False
        child.registered = full
        child.keys = parent.keys[: full + 1]
        self.states.give(self._take_slot(), child)
        self.tensors.copy_slot(parent.slot, child.slot)
        self.leases[child_id] = child
        return True

    # ---------------------------------------------------------------- it runs

    def reserve(self, seq_id: int, num_tokens: int) -> bool:
        """Have blocks for positions below ``num_tokens``, evicting cached ones as needed.

        Returns:
            False, with nothing changed, if other sequences use too many.
        """
        lease = self.leases.get(seq_id)
        if lease is None:
            raise _unknown(seq_id)
        table = lease.table
        if num_tokens <= len(table) * self.block_size:
            return True
        taken = self._take_blocks(self._num_blocks(num_tokens) - len(table))
        table += taken
        return bool(taken)

    def block_table(self, seq_id: int) -> list[int]:
        """The sequence's blocks in order: the live list, not to be changed."""
        return self._lease(seq_id).table

    def slot(self, seq_id: int) -> int:
        """The sequence's state slot."""
        return self._lease(seq_id).slot

    def position(self, seq_id: int) -> int:
        """Tokens the sequence has committed."""
        return self._lease(seq_id).position

    def plan_saves(self, seq_id: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Snapshots that the prefill piece [start, stop) should save on its way.

        To be asked for every piece, right before it runs: what an earlier answer reserved and no
        commit published is taken back.

        Returns:
            (position, slot), ascending, with start < position <= stop: after the token at
            ``position - 1`` its state belongs into that slot.
        """
        lease = self._lease(seq_id)
        self._drop_plans(lease)
        if not lease.wanted or lease.wanted[-1][0] <= start:
            return []
        if start != lease.position:
            raise EngineError(
                f"sequence {seq_id}: a piece from {start} on cannot follow {lease.position}"
                " committed tokens"
            )
        found = [(worth, position) for position, worth in lease.wanted if start < position <= stop]
        for worth, position in sorted(found, reverse=True):
            self._plan(lease, position, worth)
        lease.plans.sort(key=lambda plan: plan.position)
        lease.planned_from = start
        if lease.plans:
            lease.boundary = 0
        return [(plan.position, plan.slot) for plan in lease.plans]

    def _plan(self, lease: Lease, position: int, worth: float) -> None:
        """Reserve a slot for a snapshot, if nobody has that state and a slot can be had."""
        node_key, tail = lease.key(position // self.block_size), lease.tail(position)
        node = lease.root if position < self.block_size else self.index.nodes.get(node_key)
        key = snapshot_key(node_key, tail)
        if key in self.planned or (node is not None and tail in node.snapshots):
            return
        if not self.states.free:
            victim = self.states.victim()
            if victim is None or victim.score >= self.index.now + worth:
                return
            self.index.evict_snapshot(victim)
        plan = Plan(position, -1, worth, key)
        self.states.give(self.states.free.pop(), plan)
        self.planned[key] = plan
        lease.plans.append(plan)

    def commit(self, seq_id: int, num_computed: int) -> None:
        """Tokens below ``num_computed`` are in the cache and verified.

        Full blocks become known, and the snapshots planned up to here with them.

        Raises:
            EngineError: fewer tokens than before, more than the sequence has, or rows without room.
        """
        lease = self.leases.get(seq_id)
        if lease is None:
            raise _unknown(seq_id)
        if lease.position <= num_computed < lease.boundary:
            lease.position = num_computed
        else:
            self._commit(lease, num_computed)

    def _commit(self, lease: Lease, position: int) -> None:
        room = len(lease.table) * self.block_size
        if not lease.position <= position <= min(len(lease.tokens), room):
            raise EngineError(
                f"sequence {lease.seq_id} cannot commit {position} tokens: {lease.position} are"
                f" committed, it has {len(lease.tokens)} tokens and room for {room}"
            )
        start, lease.position = lease.position, position
        full = position // self.block_size
        if self.enabled:
            if full > lease.registered:
                self._chain(lease, full)
                lease.registered = full
            if lease.plans and start == lease.planned_from:
                self._publish_plans(lease)
            self._drop_plans(lease)
        lease.boundary = min(room, (full + 1) * self.block_size) if self.enabled else room

    def _publish_plans(self, lease: Lease) -> None:
        kept: list[Plan] = []
        for plan in lease.plans:
            if plan.position > lease.position:
                kept.append(plan)
                continue
            del self.planned[plan.key]
            if not self._publish(lease, plan, plan.position, plan.worth):
                self.states.release(plan.slot)
        lease.plans = kept

    def _publish(
        self, lease: Lease, owner: Plan | Lease, position: int, worth: float
    ) -> Snapshot | None:
        """Turn ``owner``'s slot into the snapshot of the lease at ``position``.

        Returns:
            None if that cannot be or need not be; ``owner`` has its slot still.
        """
        full = position // self.block_size
        node = self._chain(lease, full)
        if node is None:
            return None
        block = lease.table[full] if position % self.block_size else -1
        if block in self.blocks.tainted:
            return None
        snapshot = self.index.publish(owner, node, lease.tail(position), block, worth)
        if snapshot is not None:
            lease.published.append(snapshot)
        return snapshot

    def _chain(self, lease: Lease, full: int) -> Node | None:
        """The node of the lease's first ``full`` blocks; what the index lacks of them is entered.

        Ancestors can be missing where they were evicted while this sequence ran on blocks of its
        own. None if a block is tainted.
        """
        nodes, first = self.index.nodes, full
        while first and lease.key(first) not in nodes:
            first -= 1
        node = nodes[lease.key(first)] if first else lease.root
        # Known blocks are offered again: an unused twin of this one may as well be freed.
        for place in range(min(first, lease.registered), full):
            block = lease.table[place]
            if block in self.blocks.tainted:
                return None
            parent = nodes[lease.key(place)] if place else lease.root
            node = self.index.insert(parent, lease.key(place + 1), block)
        return node

    # ---------------------------------------------------------------- it ends

    def finish(self, seq_id: int, num_computed: int) -> None:
        """End a sequence: its state stays as a snapshot at ``num_computed``, its blocks cached."""
        self.commit(seq_id, num_computed)
        lease = self.leases[seq_id]
        self._drop_plans(lease)
        if self.enabled and self.needs_state and lease.position:
            self._publish(lease, lease, lease.position, WORTH)
        self._leave(lease)

    def discard(self, seq_id: int, *, poisoned: bool = False) -> None:
        """End a sequence whose state is not to be kept; blocks it has committed stay cached.

        Args:
            seq_id: which.
            poisoned: its values are not finite. Nothing that came from it stays, nor the snapshot
                it began from, and its memory is zeroed before anybody gets it.
        """
        lease = self._lease(seq_id)
        if poisoned:
            self._forget(lease)
        self._drop_plans(lease)
        self._leave(lease)

    def _forget(self, lease: Lease) -> None:
        """Drop and zero what a poisoned sequence wrote, whoever made it known."""
        index = self.index
        slots = [lease.slot, *(plan.slot for plan in lease.plans)]
        own = lease.table[lease.hit // self.block_size :]
        self.blocks.tainted.update(own)
        for block in own:
            slots += [index.drop_snapshot(found) for found in list(index.tails.get(block, ()))]
            if (node := index.node_of.get(block)) is not None:
                slots += index.drop_node(node)
        for snapshot in (lease.attached, *lease.published):
            if snapshot is not None and snapshot.slot >= 0:
                slots.append(index.drop_snapshot(snapshot))
        for slot in slots:
            self.tensors.reset_slot(slot)
        if self.tiers is not None:
            for place in range(lease.hit // self.block_size, lease.position // self.block_size):
                self.tiers.remove(block_name(lease.key(place + 1)))
            if lease.source:
                self.tiers.remove(lease.source)
            for snapshot in (lease.attached, *lease.published):
                if snapshot is not None:
                    self.tiers.remove(state_name(snapshot.node.key, snapshot.tail))

    def _leave(self, lease: Lease) -> None:
        if lease.slot >= 0:
            self.states.release(lease.slot)
        self._release_table(lease)
        del self.leases[lease.seq_id]

    def _release_table(self, lease: Lease) -> None:
        # The last block first, so that it is also the first to be evicted.
        for block in reversed(lease.table):
            self.blocks.release(block)
        lease.table = []

    def _drop_plans(self, lease: Lease) -> None:
        for plan in lease.plans:
            del self.planned[plan.key]
            self.states.release(plan.slot)
        lease.plans = []

    # ---------------------------------------------------------------- it waits in host memory

    def swap_out(self, seq_id: int) -> SwappedState:
        """Move a sequence to host memory; its id is free for ``swap_in``."""
        lease = self._lease(seq_id)
        self._drop_plans(lease)
        table = lease.table[: self._num_blocks(lease.position)]
        swapped = SwappedState(
            lease,
            table,
            [self.tensors.read_block(block) for block in table],
            [self.index.node_of.get(block) for block in table],
            self.tensors.read_slot(lease.slot),
        )
        self._leave(lease)
        return swapped

    def swap_in(self, seq_id: int, swapped: SwappedState) -> bool:
        """Seat a sequence again as it was. Blocks that are still cached are not copied.

        Returns:
            False, with nothing changed, if no slot or too few blocks can be had now.
        """
        if seq_id in self.leases:
            raise EngineError(f"sequence {seq_id} has begun already")
        if not self.states.num_available:
            return False
        lease, blocks = swapped.lease, self.blocks
        lease.seq_id, lease.boundary = seq_id, 0
        lease.registered = 0  # what was evicted meanwhile is entered again
        there = [
            node is not None and self.index.alive(node) and node.block == block
            for node, block in zip(swapped.nodes, swapped.table, strict=True)
        ]
        kept = [block for block, same in zip(swapped.table, there, strict=True) if same]
        for block in kept:
            blocks.share(block)
        fresh = self._take_blocks(there.count(False))
        if len(fresh) + len(kept) < len(there):
            for block in reversed(kept):
                blocks.release(block)
            return False
        for block, same, rows in zip(swapped.table, there, swapped.blocks, strict=True):
            if not same:
                block = fresh.pop()
                self.tensors.write_block(block, rows)
            lease.table.append(block)
        self.states.give(self._take_slot(), lease)
        self.tensors.write_slot(lease.slot, swapped.state)
        self.leases[seq_id] = lease
        return True

    # ---------------------------------------------------------------- the process ends

    def close(self) -> None:
        """Give the tiers what is cached, so that a tier on disk has it after a restart."""
        if self.tiers is None:
            return
        for snapshot in [s for s in self.states.owners if isinstance(s, Snapshot)]:
            self.tiers.snapshot(snapshot)
        for node in self.index.nodes.values():
            self.tiers.block(node)
        self.tiers.close()

    # ---------------------------------------------------------------- the books

    def check(self, positions: Mapping[int, int] | None = None, *, full: bool = True) -> None:
        """Compare the books with each other.

        Args:
            positions: tokens every running sequence believes to have computed, by id.
            full: everything, in time proportional to the pools; otherwise only running sequences.

        Raises:
            EngineError: a block or slot that is leaked, owned twice or stale, and which.
        """
        check_books(self, positions, full=full)

    @property
    def stats(self) -> CacheStats:
        """Counters so far, and what is used now."""
        stats, blocks, states = self._stats, self.blocks, self.states
        stats.evicted_blocks = self.index.evicted_blocks
        stats.evicted_snapshots = self.index.evicted_snapshots
        stats.blocks_used = blocks.num_used
        stats.blocks_cached, stats.blocks_free = len(blocks.cached), len(blocks.free)
        stats.slots_cached, stats.slots_free = states.num_snapshots, len(states.free)
        stats.slots_used = states.num_slots - states.num_available
        return stats

    def _take_blocks(self, count: int) -> list[int]:
        """``count`` blocks, evicting cached ones, or none at all."""
        if count > self.blocks.num_available:
            return []
        while len(self.blocks.free) < count:
            self.index.evict(next(iter(self.blocks.cached)))
        return [self.blocks.take() for _ in range(count)]

    def _take_slot(self) -> int:
        """A slot for a running sequence, evicting a snapshot if none is free."""
        if not self.states.free:
            victim = self.states.victim()
            if victim is None:
                raise EngineError("a state slot was asked for and all of them are running")
            self.index.evict_snapshot(victim)
        return self.states.free.pop()

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _lease(self, seq_id: int) -> Lease:
        lease = self.leases.get(seq_id)
        if lease is None:
            raise _unknown(seq_id)
        return lease


def _unknown(seq_id: int) -> EngineError:
    return EngineError(f"sequence {seq_id} holds no cache: it has not begun, or has ended")
