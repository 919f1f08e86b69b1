"""PrefixIndex: which token prefixes have blocks and states, as a tree of full blocks.

Lookup walks the chain of keys from the root. A snapshot hangs on the last full block before its
position, and dropping a node drops everything that builds on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol
from weakref import WeakValueDictionary

from qnext.engine.cache.blocks import BlockPool
from qnext.engine.cache.entries import Lease, Node, Plan, Snapshot, chain_key
from qnext.engine.cache.states import StatePool


class Spill(Protocol):
    """Takes what is about to be evicted to a lower tier."""

    def snapshot(self, snapshot: Snapshot) -> None:
        """Keep a state and the rows of its tail."""

    def block(self, node: Node) -> None:
        """Keep a full block."""


class PrefixIndex:
    """Nodes and snapshots over the blocks and slots of two pools.

    Args:
        fingerprint: everything but tokens and salt that a state depends on.
        block_size: tokens of a full block.
        blocks: holds of nodes and tails are counted here.
        states: owners of the snapshots' slots.
        spill: gets what is evicted, None where there is no lower tier.
    """

    def __init__(
        self,
        fingerprint: bytes,
        block_size: int,
        blocks: BlockPool,
        states: StatePool,
        spill: Spill | None = None,
    ) -> None:
        self.fingerprint, self.block_size = fingerprint, block_size
        self.blocks, self.states, self.spill = blocks, states, spill
        self.nodes: dict[bytes, Node] = {}
        self.node_of: dict[int, Node] = {}
        self.tails: dict[int, list[Snapshot]] = {}
        self.now = 0.0
        self.evicted_blocks = self.evicted_snapshots = 0
        self._roots: WeakValueDictionary[bytes, Node] = WeakValueDictionary()

    def root(self, salt: bytes) -> Node:
        """The tree of one salt; it lives as long as anything in it does."""
        root = self._roots.get(salt)
        if root is None:
            sizes = (self.block_size, len(self.fingerprint))
            key = chain_key(b"qnext cache" + self.fingerprint + salt, sizes)
            root = self._roots[salt] = Node(key, None, 0, -1)
        return root

    def walk(self, lease: Lease, stop: int) -> list[Node]:
        """The known nodes along a sequence's first ``stop`` tokens, root first."""
        path, size = [lease.root], self.block_size
        while len(path) * size <= stop:
            node = self.nodes.get(lease.key(len(path)))
            if node is None:
                break
            path.append(node)
        return path

    @staticmethod
    def snapshots(path: Sequence[Node], tokens: Sequence[int], stop: int) -> Iterator[Snapshot]:
        """Snapshots of prefixes of ``tokens``, of at most ``stop`` of them, the longest first."""
        for node in reversed(path):
            for tail in sorted(node.snapshots, key=len, reverse=True):
                end = node.end + len(tail)
                snapshot = node.snapshots.get(tail)  # evicting in between may have dropped it
                if snapshot and end <= stop and tail == tuple(tokens[node.end : end]):
                    yield snapshot

    def insert(self, parent: Node, key: bytes, block: int) -> Node:
        """Make a full block known.

        A block that is known already stays private to its sequence, unless nobody uses the known
        one: then the two change places, and the old one is free.

        Returns:
            the node of that key.
        """
        node = self.nodes.get(key)
        if node is None:
            node = Node(key, parent, parent.end + self.block_size, block)
            self.nodes[key] = parent.children[key] = node
        elif node.block == block or self.blocks.refs[node.block]:
            return node
        else:
            del self.node_of[node.block]
            self.blocks.unhold(node.block)
            node.block = block
        self.node_of[block] = node
        self.blocks.hold(block)
        return node

    def publish(
        self, owner: Lease | Plan, node: Node, tail: tuple[int, ...], block: int, worth: float
    ) -> Snapshot | None:
        """Turn an owner's slot into a snapshot.

        Args:
            owner: its slot has the state; it loses the slot.
            node: last full block before the state's position.
            tail: tokens between.
            block: where the tail's rows lie, of no meaning without a tail.
            worth: see policy.py.

        Returns:
            the snapshot, or None if the state was known: then the owner keeps its slot.
        """
        if (known := node.snapshots.get(tail)) is not None:
            known.worth = max(known.worth, worth)
            self.states.touch(known, self.now)
            return None
        slot, end = owner.slot, node.end + len(tail)
        snapshot = Snapshot(node, tail, block if tail else None, end, slot, worth)
        snapshot.score = self.now + worth
        owner.slot = -1
        self.states.give(slot, snapshot)
        node.snapshots[tail] = snapshot
        if snapshot.block is not None:
            self.tails.setdefault(snapshot.block, []).append(snapshot)
            self.blocks.hold(snapshot.block)
        return snapshot

    def alive(self, node: Node) -> bool:
        """Whether the index still has this very node."""
        return node.parent is None or self.nodes.get(node.key) is node

    def evict_snapshot(self, snapshot: Snapshot) -> None:
        """Give a snapshot's slot back to the pool."""
        if self.spill is not None:
            self.spill.snapshot(snapshot)
        self.evicted_snapshots += 1
        self.drop_snapshot(snapshot)
        self._demote(snapshot.node)

    def _demote(self, node: Node) -> None:
        """Blocks that no state needs any more are the next to go, the last one first."""
        useless: list[int] = []
        found: Node | None = node
        while found is not None and found.block in self.blocks.cached:
            if found.snapshots or len(found.children) > bool(useless):
                break
            useless.append(found.block)
            found = found.parent
        for block in reversed(useless):
            self.blocks.cached.move_to_end(block, last=False)

    def evict(self, block: int) -> None:
        """Forget what a block holds, and all that needs it; unless it is in use it is free then."""
        for snapshot in list(self.tails.get(block, ())):
            self.evict_snapshot(snapshot)
        node = self.node_of.get(block)
        if node is None:
            self.evicted_blocks += 1
        else:
            order = _subtree(node)
            for below in reversed(order):
                for snapshot in list(below.snapshots.values()):
                    self.evict_snapshot(snapshot)
                if self.spill is not None:
                    self.spill.block(below)
            self.evicted_blocks += len(order)
            self.drop_node(node)

    def drop_node(self, node: Node) -> list[int]:
        """Forget a block and everything that builds on it; nothing is spilled.

        Returns:
            state slots that are free now.
        """
        order, slots = _subtree(node), []
        if node.parent is not None:
            del node.parent.children[node.key]
        for below in reversed(order):
            slots += [self.drop_snapshot(found) for found in list(below.snapshots.values())]
            del self.nodes[below.key], self.node_of[below.block]
            self.blocks.unhold(below.block)
        return slots

    def drop_snapshot(self, snapshot: Snapshot) -> int:
        """Forget a state; nothing is spilled. Returns its slot, which is free now."""
        slot = snapshot.slot
        del snapshot.node.snapshots[snapshot.tail]
        self.states.release(slot)
        if snapshot.block is not None:
            others = self.tails[snapshot.block]
            others.remove(snapshot)
            if not others:
                del self.tails[snapshot.block]
            self.blocks.unhold(snapshot.block)
        return slot


def _subtree(node: Node) -> list[Node]:
    """A node and everything below it, parents before children."""
    order = [node]
    for found in order:
        order += found.children.values()
    return order
