"""CacheManager: the one owner of KV blocks and state slots, and the only door to them.

A sequence begins (with whatever prefix is cached), reserves room, runs, commits what is verified
and finishes. All of it is bookkeeping on the host; tensors move only through ``CacheTensors``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qnext.engine.cache.attach import Attach
from qnext.engine.cache.check import check_books
from qnext.engine.cache.entries import Lease, Node, Snapshot
from qnext.engine.cache.memory import Memory
from qnext.engine.cache.policy import WORTH, turn_ends, wanted_snapshots
from qnext.engine.cache.saves import Saves
from qnext.engine.cache.spill import TierChain
from qnext.engine.cache.stats import CacheStats
from qnext.engine.cache.swap import SwappedState, swap_in, swap_out
from qnext.engine.cache.tensors import CacheTensors
from qnext.engine.cache.tiers import Tier
from qnext.errors import ConfigError, EngineError


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
        self.block_size = block_size
        self.needs_state, self.enabled = needs_state, enable_prefix_caching
        self.snapshot_interval, self.turn_end_ids = snapshot_interval, turn_end_ids
        self.leases: dict[int, Lease] = {}
        self._stats = CacheStats()
        self._refused: Lease | None = None
        self._tiers: TierChain | None = None
        if tiers and enable_prefix_caching:
            self._tiers = TierChain(tiers, tensors, needs_state=needs_state)
        self.memory = Memory(
            tensors,
            num_blocks=num_blocks,
            block_size=block_size,
            num_slots=num_slots,
            fingerprint=fingerprint,
            tiers=self._tiers,
        )
        self.saves = Saves(self.memory)
        self._attach = Attach(self.memory, self.saves, self._stats, needs_state=needs_state)

    # ---------------------------------------------------------------- a sequence begins

    def can_ever_fit(self, num_tokens: int) -> bool:
        """Whether a sequence of this length could run alone."""
        return self.memory.num_blocks(num_tokens) <= self.memory.blocks.num_blocks

    def begin(
        self,
        seq_id: int,
        tokens: Sequence[int],
        *,
        salt: bytes = b"",
        max_cached: int | None = None,
        room: int = 0,
    ) -> int | None:
        """Seat a sequence on the longest cached prefix of its tokens.

        Args:
            seq_id: not seated yet.
            tokens: the sequence's own list: tokens may be added while it runs, never changed.
            salt: whatever else its states depend on, such as the adapter.
            max_cached: most tokens to take from the cache; None means all of them, where a stored
                hidden state then gives the logits of the last one.
            room: tokens that will be reserved next; where other sequences have too many blocks for
                that anyway, nothing is looked up and copied in vain.

        Returns:
            tokens whose KV and state it now has, 0 for a clean slot; None, with nothing changed, if
            no slot or no room can be had.

        Raises:
            EngineError: ``seq_id`` is seated already.
        """
        if seq_id in self.leases:
            raise EngineError(f"sequence {seq_id} has begun already")
        if not self.memory.states.num_available:
            return None
        lease, path = self._known(seq_id, tokens, salt)
        blocks = self.memory.blocks
        used = sum(blocks.refs[node.block] > 0 for node in path[1:])
        if self.memory.num_blocks(room) - used > blocks.num_available:
            self._refused = lease
            return None
        self._refused = None
        self.memory.index.now += 1
        if self.enabled:
            self._look_up(lease, path, len(tokens), max_cached)
        if lease.slot < 0:
            self.memory.tensors.reset_slot(self.memory.seat(lease))
        lease.hit = lease.position
        lease.registered = lease.position // self.block_size
        self.leases[seq_id] = lease
        return lease.position

    def _known(self, seq_id: int, tokens: Sequence[int], salt: bytes) -> tuple[Lease, list[Node]]:
        """A new lease and the known blocks of its tokens, the root first."""
        root = self.memory.index.root(salt)
        lease, again = Lease(seq_id, tokens, root, self.block_size), self._refused
        if again is not None and again.tokens is tokens and again.root is root:
            lease.keys = again.keys  # who waits asks in every step
        return lease, self.memory.index.walk(lease, len(tokens) if self.enabled else 0)

    def _look_up(self, lease: Lease, path: list[Node], length: int, max_cached: int | None) -> None:
        """Attach what is cached, and decide which states of the rest to save."""
        known = path[-1].end
        self._attach.longest(lease, path, length if max_cached is None else min(length, max_cached))
        self._stats.queries += 1
        self._stats.tokens_queried += length
        self._stats.hits += lease.position > 0
        self._stats.tokens_hit += lease.position
        if self.needs_state:
            lease.wanted = wanted_snapshots(
                turn_ends(lease.tokens, self.turn_end_ids),
                lease.position,
                length,
                block_size=self.block_size,
                branch=known,
                interval=self.snapshot_interval,
            )

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
        if not self.memory.states.num_available:
            return False
        position = parent.position
        child = Lease(child_id, tokens, parent.root, self.block_size, position=position)
        child.hit, child.attached = position, parent.attached
        full = position // self.block_size
        self.memory.share(child, parent.table[:full])
        if position % self.block_size and not self.memory.copy_tail(child, parent.table[full]):
            self.memory.release_table(child)
            return False
        child.registered = full
        child.keys = parent.keys[: full + 1]
        self.memory.tensors.copy_slot(parent.slot, self.memory.seat(child))
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
        taken = self.memory.take_blocks(self.memory.num_blocks(num_tokens) - len(table))
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
        self.saves.settle(lease, publish=False)
        if not lease.wanted or lease.wanted[-1][0] <= start:
            return []
        if start != lease.position:
            raise EngineError(
                f"sequence {seq_id}: a piece from {start} on cannot follow {lease.position}"
                " committed tokens"
            )
        found = [(worth, position) for position, worth in lease.wanted if start < position <= stop]
        for worth, position in sorted(found, reverse=True):
            self.saves.plan(lease, position, worth)
        lease.plans.sort(key=lambda plan: plan.position)
        if lease.plans:
            lease.boundary = 0
        return [(plan.position, plan.slot) for plan in lease.plans]

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
        lease.position = position
        full = position // self.block_size
        if self.enabled:
            if full > lease.registered:
                self.saves.chain(lease, full)
            if lease.plans:
                self.saves.settle(lease, publish=True)
        lease.boundary = min(room, (full + 1) * self.block_size) if self.enabled else room

    # ---------------------------------------------------------------- it ends

    def finish(self, seq_id: int, num_computed: int) -> None:
        """End a sequence: its state stays as a snapshot at ``num_computed``, its blocks cached."""
        self.commit(seq_id, num_computed)
        lease = self.leases[seq_id]
        self.saves.settle(lease, publish=False)
        if self.enabled and self.needs_state and lease.position:
            self.saves.publish(lease, lease, lease.position, WORTH)
        self.memory.leave(lease)
        del self.leases[seq_id]

    def discard(self, seq_id: int, *, poisoned: bool = False) -> None:
        """End a sequence whose state is not to be kept; blocks it has committed stay cached.

        Args:
            seq_id: which.
            poisoned: its values are not finite. Nothing that came from it stays, nor the snapshot
                it began from, and its memory is zeroed before anybody gets it.
        """
        lease = self._lease(seq_id)
        if poisoned:
            self.saves.forget(lease)
        self.saves.settle(lease, publish=False)
        self.memory.leave(lease)
        del self.leases[seq_id]

    # ---------------------------------------------------------------- it waits in host memory

    def swap_out(self, seq_id: int) -> SwappedState:
        """Move a sequence to host memory; its id is free for ``swap_in``."""
        lease = self._lease(seq_id)
        self.saves.settle(lease, publish=False)
        swapped = swap_out(self.memory, lease)
        del self.leases[seq_id]
        return swapped

    def swap_in(self, seq_id: int, swapped: SwappedState) -> bool:
        """Seat a sequence again as it was. Blocks that are still cached are not copied.

        Returns:
            False, with nothing changed, if no slot or too few blocks can be had now.
        """
        if seq_id in self.leases:
            raise EngineError(f"sequence {seq_id} has begun already")
        if not self.memory.states.num_available:
            return False
        if not swap_in(self.memory, swapped):
            return False
        swapped.lease.seq_id = seq_id
        self.leases[seq_id] = swapped.lease
        return True

    # ---------------------------------------------------------------- the process ends

    def close(self) -> None:
        """Give the tiers what is cached, so that a tier on disk has it after a restart."""
        if self._tiers is None:
            return
        for owner in self.memory.states.owners:
            if isinstance(owner, Snapshot):
                self._tiers.snapshot(owner)
        for node in self.memory.index.nodes.values():
            self._tiers.block(node)
        self._tiers.close()

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
        stats, blocks, states = self._stats, self.memory.blocks, self.memory.states
        stats.evicted_blocks = self.memory.index.evicted_blocks
        stats.evicted_snapshots = self.memory.index.evicted_snapshots
        stats.blocks_used = blocks.num_used
        stats.blocks_cached, stats.blocks_free = len(blocks.cached), len(blocks.free)
        stats.slots_cached, stats.slots_free = states.num_snapshots, len(states.free)
        stats.slots_used = states.num_slots - states.num_available
        return stats

    def _lease(self, seq_id: int) -> Lease:
        lease = self.leases.get(seq_id)
        if lease is None:
            raise _unknown(seq_id)
        return lease


def _unknown(seq_id: int) -> EngineError:
    return EngineError(f"sequence {seq_id} holds no cache: it has not begun, or has ended")
