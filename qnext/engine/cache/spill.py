"""TierChain: what is evicted goes down the tiers, and longer prefixes are looked up there.

Only states worth keeping are spilled (ends, turns, branches and whatever was hit before), and only
blocks below such a state: copying all the others would cost more than it saves.
"""

from __future__ import annotations

from collections.abc import Sequence

from qnext.engine.cache.entries import Lease, Node, Snapshot, snapshot_key
from qnext.engine.cache.policy import WORTH
from qnext.engine.cache.tensors import CacheTensors, Tensors
from qnext.engine.cache.tiers import Tier

_STATE, _TAIL = "state/", "tail/"


def block_name(key: bytes) -> str:
    """Name of a full block in a tier."""
    return key.hex()


def state_name(node_key: bytes, tail: Sequence[int]) -> str:
    """Name of a state in a tier: its block, the length of its tail, its key."""
    return f"{node_key.hex()}-{len(tail)}-{snapshot_key(node_key, tail).hex()}"


class TierChain:
    """The lower tiers of one cache, the fastest first.

    Args:
        tiers: at least one.
        tensors: where entries are read from.
        needs_state: whether blocks are of no use without a state.
    """

    def __init__(self, tiers: Sequence[Tier], tensors: CacheTensors, *, needs_state: bool) -> None:
        self.tiers, self.tensors, self.needs_state = tuple(tiers), tensors, needs_state

    # ------------------------------------------------------------ down

    def snapshot(self, snapshot: Snapshot) -> None:
        """Keep a state and the rows of its tail, if it is worth it."""
        if snapshot.worth < WORTH:
            return
        name = state_name(snapshot.node.key, snapshot.tail)
        if not self.contains(name):
            entry = {_STATE + k: t for k, t in self.tensors.read_slot(snapshot.slot).items()}
            if snapshot.block is not None:
                rows = self.tensors.read_block(snapshot.block)
                entry |= {_TAIL + k: t for k, t in rows.items()}
            self.put(name, entry)
        node: Node | None = snapshot.node
        while node is not None and not node.spilled:
            node.spilled = True
            node = node.parent

    def block(self, node: Node) -> None:
        """Keep a full block, if a state that was kept needs it."""
        if node.parent is None or (self.needs_state and not node.spilled):
            return
        name = block_name(node.key)
        if not self.contains(name):
            self.put(name, self.tensors.read_block(node.block))

    def put(self, name: str, tensors: Tensors, *, first: int = 0, wait: bool = False) -> None:
        """Store in tier ``first``; what that displaces goes further down."""
        entries = [(name, tensors)]
        for tier in self.tiers[first:]:
            entries = [out for entry in entries for out in tier.put(*entry, wait=wait)]

    def remove(self, name: str) -> None:
        """Forget an entry in every tier."""
        for tier in self.tiers:
            tier.remove(name)

    def forget(self, lease: Lease, snapshots: Sequence[Snapshot]) -> None:
        """Remove what a poisoned sequence wrote, and the states given."""
        for place in range(lease.hit // lease.block_size, lease.position // lease.block_size):
            self.remove(block_name(lease.key(place + 1)))
        for snapshot in snapshots:
            self.remove(state_name(snapshot.node.key, snapshot.tail))
        if lease.source:
            self.remove(lease.source)

    def close(self) -> None:
        """Move what would be lost with the process further down, and end."""
        for place, tier in enumerate(self.tiers):
            for name, tensors in tier.drain():
                self.put(name, tensors, first=place + 1, wait=True)
        for tier in self.tiers:
            tier.close()

    # ------------------------------------------------------------ up

    def contains(self, name: str) -> bool:
        """Whether some tier has it."""
        return any(tier.contains(name) for tier in self.tiers)

    def get(self, name: str) -> Tensors | None:
        """From the first tier that has it."""
        for tier in self.tiers:
            found = tier.get(name)
            if found is not None:
                return found
        return None

    def state(self, name: str) -> tuple[Tensors, Tensors] | None:
        """What a slot and the block of a tail held."""
        found = self.get(name)
        if found is None:
            return None
        state = {k.removeprefix(_STATE): t for k, t in found.items() if k.startswith(_STATE)}
        tail = {k.removeprefix(_TAIL): t for k, t in found.items() if k.startswith(_TAIL)}
        return state, tail

    def longer(self, lease: Lease, known: int, limit: int, above: int) -> list[tuple[int, str]]:
        """Prefixes that tiers can complete and that are worth fetching.

        Args:
            lease: whose tokens.
            known: full blocks that are on the device.
            limit: most tokens.
            above: tokens of the best prefix on the device.

        Returns:
            (position, name of the state, empty where none is needed), the longest first.
        """
        for tier in self.tiers:
            tier.refresh()
        size, reach = lease.block_size, known
        while (reach + 1) * size <= limit and self.contains(block_name(lease.key(reach + 1))):
            reach += 1
        if not self.needs_state:
            gain = reach * size - above
            return [(reach * size, "")] if self._pays(block_name(lease.key(reach)), gain) else []
        found: dict[int, str] = {}
        for full in range(reach, above // size - 1, -1):
            block = block_name(lease.key(full))
            for name in {name for tier in self.tiers for name in tier.states_of(block)}:
                position = full * size + int(name.split("-")[1])
                if above < position <= limit and self._pays(name, position - above):
                    tail = lease.tokens[full * size : position]
                    if state_name(lease.key(full), tail) == name:
                        found[position] = name
        return sorted(found.items(), reverse=True)

    def _pays(self, name: str, gain: int) -> bool:
        for tier in self.tiers:
            if tier.contains(name):
                return gain >= max(1, tier.min_tokens)
        return False
