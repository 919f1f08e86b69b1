"""What the cache is made of: nodes (full blocks), snapshots (states), leases (who is running)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b


def chain_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a prefix: BLAKE2b-256 over the key of what comes before, and the token ids."""
    return blake2b(parent + array("I", tokens).tobytes(), digest_size=32).digest()


class Node:
    """A full block whose content is known: the tokens of its key, from position 0 on.

    Attributes:
        key: of all tokens up to ``end``.
        parent: the block before; None in a root, which stands for no tokens under one salt.
        end: tokens that the chain covers.
        block: id of the KV block, -1 in a root.
        children: nodes that continue this one.
        snapshots: states at ``end + len(tail)``, by their tail of fewer than a block's tokens.
        spilled: a lower tier was given a snapshot that needs this block.
    """

    __slots__ = (
        "__weakref__",
        "block",
        "children",
        "end",
        "key",
        "parent",
        "snapshots",
        "spilled",
    )

    def __init__(self, key: bytes, parent: Node | None, end: int, block: int) -> None:
        self.key, self.parent, self.end, self.block = key, parent, end, block
        self.children: dict[bytes, Node] = {}
        self.snapshots: dict[tuple[int, ...], Snapshot] = {}
        self.spilled = False


@dataclass(eq=False, slots=True)
class Snapshot:
    """A saved state: everything a sequence remembers after ``position`` tokens, KV aside.

    Attributes:
        node: last full block before ``position``.
        tail: tokens between that block's end and ``position``.
        block: where the rows of the tail lie; None without a tail.
        slot: where the state lies; -1 once dropped.
        worth: how long it is kept beyond its last use, see policy.py.
        score: last use plus worth; the lowest goes first.
    """

    node: Node
    tail: tuple[int, ...]
    block: int | None
    position: int
    slot: int
    worth: float
    score: float = 0.0


def snapshot_key(node_key: bytes, tail: Sequence[int]) -> bytes:
    """Key of a state, apart from every block's: its block's key, a mark, and the tail."""
    return chain_key(node_key + b"state", tail)


@dataclass(eq=False, slots=True)
class Plan:
    """A slot reserved for a snapshot that a prefill piece saves on its way."""

    position: int
    slot: int
    worth: float
    key: bytes


@dataclass(eq=False, slots=True)
class Lease:
    """What one running sequence holds.

    Attributes:
        tokens: the sequence's own list, which grows while it runs.
        root: the prefix tree it belongs to.
        slot: its state.
        position: tokens that state and KV rows stand for.
        table: its blocks in order.
        hit: tokens that were cached when it began.
        wanted: (position, worth) of the snapshots its prompt should leave, ascending.
        plans: those that the piece now running saves; the next commit ends them.
        registered: blocks that were offered to the index.
        boundary: positions below it commit without further work.
        published: snapshots that came from it.
        attached: the snapshot it began from.
        source: name of the state that a tier gave it, if one did.
    """

    seq_id: int
    tokens: Sequence[int]
    root: Node
    block_size: int
    slot: int = -1
    position: int = 0
    table: list[int] = field(default_factory=list)
    hit: int = 0
    wanted: list[tuple[int, float]] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    registered: int = 0
    boundary: int = 0
    published: list[Snapshot] = field(default_factory=list)
    attached: Snapshot | None = None
    source: str = ""
    keys: list[bytes] = field(default_factory=list)

    def key(self, index: int) -> bytes:
        """Key of the first ``index`` blocks; 0 gives the root's."""
        keys, size = self.keys, self.block_size
        if not keys:
            keys.append(self.root.key)
        while len(keys) <= index:
            end = len(keys) * size
            keys.append(chain_key(keys[-1], self.tokens[end - size : end]))
        return keys[index]

    def tail(self, position: int) -> tuple[int, ...]:
        """Tokens between the last block boundary and ``position``."""
        return tuple(self.tokens[position - position % self.block_size : position])
