"""The invariants of the cache's books: what must hold between any two calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qnext.engine.cache.entries import Lease, Snapshot
from qnext.errors import EngineError

if TYPE_CHECKING:
    from qnext.engine.cache.manager import CacheManager


def check_books(cache: CacheManager, positions: Mapping[int, int] | None, *, full: bool) -> None:
    """See ``CacheManager.check``."""
    for seq_id, lease in cache.leases.items():
        _check_lease(cache, seq_id, lease)
        if positions is not None and positions.get(seq_id) != lease.position:
            _fail(
                f"sequence {seq_id} computed {positions.get(seq_id)} tokens, and its state is the"
                f" one after {lease.position}"
            )
    if positions is not None and len(positions) != len(cache.leases):
        _fail(f"sequences {sorted(positions)} run, and {sorted(cache.leases)} hold cache")
    states = cache.memory.states
    plans = sum(len(lease.plans) for lease in cache.leases.values())
    held = len(cache.leases) + plans + states.num_snapshots + len(states.free)
    if held != states.num_slots:
        _fail(f"{held} of {states.num_slots} state slots are accounted for")
    if full:
        _check_slots(cache)
        _check_tree(cache)
        _check_blocks(cache)


def _check_lease(cache: CacheManager, seq_id: int, lease: Lease) -> None:
    size, table, position = cache.block_size, lease.table, lease.position
    if lease.seq_id != seq_id or cache.memory.states.owners[lease.slot] is not lease:
        _fail(f"slot {lease.slot} is not sequence {seq_id}'s")
    if not lease.hit <= position <= min(len(table) * size, len(lease.tokens)):
        _fail(f"sequence {seq_id} stands at {position} with {len(table)} blocks")
    for place in range(position // size, len(table)):
        block = table[place]
        if cache.memory.blocks.refs[block] != 1 or block in cache.memory.index.node_of:
            _fail(f"sequence {seq_id} would write into block {block}, which others read")
        for snapshot in cache.memory.index.tails.get(block, ()):
            if snapshot.position > position:
                _fail(f"sequence {seq_id} would overwrite the tail of a snapshot in {block}")


def _check_slots(cache: CacheManager) -> None:
    states = cache.memory.states
    free = Counter(states.free)
    for slot, owner in enumerate(states.owners):
        if free[slot] != (owner is None):
            _fail(f"slot {slot} is {free[slot]} times free and owned by {type(owner).__name__}")
        if owner is not None and owner.slot != slot:
            _fail(f"slot {slot} is owned by somebody who sits in {owner.slot}")
    owners = {id(owner) for owner in states.owners if owner is not None}
    plans = [plan for lease in cache.leases.values() for plan in lease.plans]
    if {id(plan) for plan in plans} != {id(plan) for plan in cache.saves.planned.values()}:
        _fail("the planned snapshots are not those of the sequences")
    for lease in cache.leases.values():
        if any(plan.position <= lease.position for plan in lease.plans):
            _fail(f"sequence {lease.seq_id} plans a snapshot it has passed")
    known = {id(owner) for owner in (*cache.leases.values(), *plans)}
    known |= {id(o) for o in states.owners if isinstance(o, Snapshot)}
    if owners != known:
        _fail("a slot is owned by somebody who is gone")
    snapshots = [owner for owner in states.owners if isinstance(owner, Snapshot)]
    if len(snapshots) != states.num_snapshots:
        _fail(f"{len(snapshots)} snapshots, counted {states.num_snapshots}")
    for snapshot in snapshots:
        _check_snapshot(cache, snapshot)


def _check_snapshot(cache: CacheManager, snapshot: Snapshot) -> None:
    node, tail = snapshot.node, snapshot.tail
    if not cache.memory.index.alive(node) or node.snapshots.get(tail) is not snapshot:
        _fail(f"the snapshot in slot {snapshot.slot} hangs on a block that is gone")
    if snapshot.position != node.end + len(tail) or len(tail) >= cache.block_size:
        _fail(f"the snapshot in slot {snapshot.slot} is not at {snapshot.position}")
    if (snapshot.block is None) != (not tail):
        _fail(f"the snapshot in slot {snapshot.slot} has a tail without a block")
    if snapshot.block is not None and snapshot not in cache.memory.index.tails.get(
        snapshot.block, ()
    ):
        _fail(f"the tail of the snapshot in slot {snapshot.slot} is not held")


def _check_tree(cache: CacheManager) -> None:
    index = cache.memory.index
    for key, node in index.nodes.items():
        parent = node.parent
        if parent is None or not index.alive(parent) or parent.children.get(key) is not node:
            _fail(f"the node of block {node.block} hangs in the air")
        elif node.end != parent.end + cache.block_size or index.node_of.get(node.block) is not node:
            _fail(f"the node of block {node.block} is not the one at {node.end}")
        if any(s.slot < 0 for s in node.snapshots.values()):
            _fail(f"the node of block {node.block} has a snapshot without a slot")
        if any(index.nodes.get(child) is not found for child, found in node.children.items()):
            _fail(f"the node of block {node.block} has a child that is gone")
    if len(index.node_of) != len(index.nodes):
        _fail(f"{len(index.nodes)} nodes stand for {len(index.node_of)} blocks")


def _check_blocks(cache: CacheManager) -> None:
    blocks, index = cache.memory.blocks, cache.memory.index
    refs = Counter(block for lease in cache.leases.values() for block in lease.table)
    holds = Counter(list(index.node_of))
    holds.update({block: len(found) for block, found in index.tails.items()})
    free = Counter(blocks.free)
    for lease in cache.leases.values():
        if len(set(lease.table)) != len(lease.table):
            _fail(f"sequence {lease.seq_id} has a block twice")
    for block in range(blocks.num_blocks):
        if (blocks.refs[block], blocks.holds[block]) != (refs[block], holds[block]):
            _fail(
                f"block {block} counts {blocks.refs[block]} users, {blocks.holds[block]} holders"
                f" and has {refs[block]} and {holds[block]}"
            )
        unused = not refs[block]
        if free[block] != (unused and not holds[block]):
            _fail(f"block {block} is {free[block]} times free")
        if (block in blocks.cached) != (unused and holds[block] > 0):
            _fail(f"block {block} is wrongly on the list of cached blocks")
        if block in blocks.tainted and (unused or holds[block]):
            _fail(f"block {block} may hold non-finite values and can be found")


def _fail(what: str) -> None:
    raise EngineError(f"the cache's books are wrong: {what}")
