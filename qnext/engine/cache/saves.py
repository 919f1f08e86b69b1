"""Saves: what a sequence computed becomes known: full blocks, planned snapshots, its last state."""

from __future__ import annotations

from qnext.engine.cache.entries import Lease, Node, Plan, Snapshot, snapshot_key
from qnext.engine.cache.memory import Memory


class Saves:
    """Plans snapshots and publishes blocks and states.

    Args:
        memory: where they lie.

    Attributes:
        planned: the plans of all sequences by the key of their state, so that no two save the same.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.planned: dict[bytes, Plan] = {}

    def plan(self, lease: Lease, position: int, worth: float) -> None:
        """Reserve a slot for a snapshot, if nobody has that state and a slot can be had."""
        index, states = self.memory.index, self.memory.states
        node_key, tail = lease.key(position // lease.block_size), lease.tail(position)
        node = lease.root if position < lease.block_size else index.nodes.get(node_key)
        key = snapshot_key(node_key, tail)
        if key in self.planned or (node is not None and tail in node.snapshots):
            return
        if not states.free:
            victim = states.victim()
            if victim is None or victim.score >= index.now + worth:
                return
            index.evict_snapshot(victim)
        plan = Plan(position, -1, worth, key)
        states.give(states.free.pop(), plan)
        self.planned[key] = plan
        lease.plans.append(plan)

    def settle(self, lease: Lease, *, publish: bool) -> None:
        """End all plans: those up to the lease's position can be published, the others are void."""
        for plan in lease.plans:
            del self.planned[plan.key]
            if publish and plan.position <= lease.position:
                self.publish(lease, plan, plan.position, plan.worth)
            if plan.slot >= 0:
                self.memory.states.release(plan.slot)
        lease.plans = []

    def publish(
        self, lease: Lease, owner: Plan | Lease, position: int, worth: float
    ) -> Snapshot | None:
        """Turn ``owner``'s slot into the snapshot of the lease at ``position``.

        Returns:
            None if that cannot be or need not be; ``owner`` has its slot still.
        """
        full = position // lease.block_size
        node = self.chain(lease, full)
        if node is None:
            return None
        block = lease.table[full] if position % lease.block_size else -1
        if block in self.memory.blocks.tainted:
            return None
        snapshot = self.memory.index.publish(owner, node, lease.tail(position), block, worth)
        if snapshot is not None:
            lease.published.append(snapshot)
        return snapshot

    def chain(self, lease: Lease, full: int) -> Node | None:
        """The node of the lease's first ``full`` blocks; what the index lacks of them is entered.

        Ancestors can be missing where they were evicted while this sequence ran on blocks of its
        own. None if a block is tainted.
        """
        index = self.memory.index
        nodes, first = index.nodes, full
        while first and lease.key(first) not in nodes:
            first -= 1
        node = nodes[lease.key(first)] if first else lease.root
        # Known blocks are offered again: an unused twin of this one may as well be freed.
        for place in range(min(first, lease.registered), full):
            block = lease.table[place]
            if block in self.memory.blocks.tainted:
                return None
            parent = nodes[lease.key(place)] if place else lease.root
            node = index.insert(parent, lease.key(place + 1), block)
        lease.registered = max(lease.registered, full)
        return node

    def forget(self, lease: Lease) -> None:
        """Drop and zero what a poisoned sequence wrote, whoever made it known."""
        memory, index = self.memory, self.memory.index
        slots = [lease.slot, *(plan.slot for plan in lease.plans)]
        own = lease.table[lease.hit // lease.block_size :]
        memory.blocks.tainted.update(own)
        for block in own:
            slots += [index.drop_snapshot(found) for found in list(index.tails.get(block, ()))]
            if (node := index.node_of.get(block)) is not None:
                slots += index.drop_node(node)
        snapshots = [lease.attached, *lease.published]
        for snapshot in snapshots:
            if snapshot is not None and snapshot.slot >= 0:
                slots.append(index.drop_snapshot(snapshot))
        for slot in slots:
            memory.tensors.reset_slot(slot)
        if memory.tiers is not None:
            memory.tiers.forget(lease, [found for found in snapshots if found is not None])
