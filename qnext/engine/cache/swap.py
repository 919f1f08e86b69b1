"""Swapping: a running sequence in host memory, exact to the bit, and back."""

from __future__ import annotations

from dataclasses import dataclass

from qnext.engine.cache.entries import Lease, Node
from qnext.engine.cache.memory import Memory
from qnext.engine.cache.tensors import Tensors


@dataclass(eq=False, slots=True)
class SwappedState:
    """What a sequence was when it gave way.

    Attributes:
        lease: what is known about it; it holds no slot and no block meanwhile.
        table: the blocks it had, up to ``lease.position``.
        blocks: what they held.
        nodes: the index entries they were, where they were any.
        state: its slot.
    """

    lease: Lease
    table: list[int]
    blocks: list[Tensors]
    nodes: list[Node | None]
    state: Tensors

    @property
    def nbytes(self) -> int:
        """Host memory it takes."""
        return sum(t.nbytes for part in (*self.blocks, self.state) for t in part.values())


def swap_out(memory: Memory, lease: Lease) -> SwappedState:
    """Copy a lease to host memory and release what it holds."""
    table = lease.table[: memory.num_blocks(lease.position)]
    swapped = SwappedState(
        lease,
        table,
        [memory.tensors.read_block(block) for block in table],
        [memory.index.node_of.get(block) for block in table],
        memory.tensors.read_slot(lease.slot),
    )
    memory.leave(lease)
    return swapped


def swap_in(memory: Memory, swapped: SwappedState) -> bool:
    """Give a lease back what it had; a block that is still cached as it was is not copied.

    Returns:
        False, with nothing changed, if there are too few blocks.
    """
    lease, index = swapped.lease, memory.index
    there = [
        node is not None and index.alive(node) and node.block == block
        for node, block in zip(swapped.nodes, swapped.table, strict=True)
    ]
    kept = [block for block, same in zip(swapped.table, there, strict=True) if same]
    for block in kept:
        memory.blocks.share(block)
    fresh = memory.take_blocks(there.count(False))
    if len(fresh) + len(kept) < len(there):
        for block in reversed(kept):
            memory.blocks.release(block)
        return False
    for block, same, rows in zip(swapped.table, there, swapped.blocks, strict=True):
        if same:
            lease.table.append(block)
        else:
            lease.table.append(fresh.pop())
            memory.tensors.write_block(lease.table[-1], rows)
    lease.boundary = lease.registered = 0  # what was evicted meanwhile is entered again
    memory.tensors.write_slot(memory.seat(lease), swapped.state)
    return True
