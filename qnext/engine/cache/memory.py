"""Memory: the two pools, the tensors behind them and the prefix index, for those behind the door.

What only moves ownership around is here; when to do so is decided in manager.py, attach.py and
saves.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from qnext.engine.cache.blocks import BlockPool
from qnext.engine.cache.entries import Lease
from qnext.engine.cache.index import PrefixIndex
from qnext.engine.cache.spill import TierChain
from qnext.engine.cache.states import StatePool
from qnext.engine.cache.tensors import CacheTensors
from qnext.errors import EngineError


class Memory:
    """Blocks and slots, taken with eviction where needed.

    Args:
        tensors: the memory itself.
        num_blocks: KV blocks.
        block_size: tokens of a block.
        num_slots: state slots.
        fingerprint: see ``PrefixIndex``.
        tiers: where evicted entries go, None for nowhere.
    """

    def __init__(
        self,
        tensors: CacheTensors,
        *,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        fingerprint: bytes,
        tiers: TierChain | None,
    ) -> None:
        self.tensors, self.block_size, self.tiers = tensors, block_size, tiers
        self.blocks = BlockPool(num_blocks, lambda block: tensors.zero_blocks([block]))
        self.states = StatePool(num_slots)
        self.index = PrefixIndex(fingerprint, block_size, self.blocks, self.states, tiers)

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` rows."""
        return -(-num_tokens // self.block_size)

    def take_blocks(self, count: int) -> list[int]:
        """``count`` blocks, evicting cached ones, or none at all."""
        if count > self.blocks.num_available:
            return []
        while len(self.blocks.free) < count:
            self.index.evict(next(iter(self.blocks.cached)))
        return [self.blocks.take() for _ in range(count)]

    def take_slot(self) -> int:
        """A slot for a running sequence, evicting a snapshot if none is free."""
        if not self.states.free:
            victim = self.states.victim()
            if victim is None:
                raise EngineError("a state slot was asked for and all of them are running")
            self.index.evict_snapshot(victim)
        return self.states.free.pop()

    def seat(self, lease: Lease) -> int:
        """Give a lease a slot of its own, whatever lies in it."""
        self.states.give(self.take_slot(), lease)
        return lease.slot

    def share(self, lease: Lease, blocks: Iterable[int]) -> None:
        """Append known blocks to a lease's table."""
        for block in blocks:
            self.blocks.share(block)
            lease.table.append(block)

    def copy_tail(self, lease: Lease, block: int) -> bool:
        """Copy on write: the rows after the last full block become the lease's own.

        Returns:
            False, with nothing changed, if no block is left.
        """
        self.blocks.share(block)
        own = self.take_blocks(1)
        if own:
            self.tensors.copy_block(block, own[0])
            lease.table += own
        self.blocks.release(block)
        return bool(own)

    def release_table(self, lease: Lease) -> None:
        """Give a lease's blocks back."""
        # The last block first, so that it is also the first to be evicted.
        for block in reversed(lease.table):
            self.blocks.release(block)
        lease.table = []

    def leave(self, lease: Lease) -> None:
        """Give everything a lease has back."""
        if lease.slot >= 0:
            self.states.release(lease.slot)
        self.release_table(lease)
