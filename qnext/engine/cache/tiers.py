"""Lower tiers: where evicted blocks and states wait, in host memory and on disk.

A tier stores named tensors and may forget them at any time. Names are those of entries.py: the key
of a block, or of the block a state hangs on, followed by the length of its tail and its own key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

from qnext.engine.cache.tensors import Tensors
from qnext.errors import ConfigError

Named = tuple[str, Tensors]


@dataclass(slots=True)
class TierStats:
    """Totals of one tier; ``damaged`` were refused and deleted, ``refused`` were never stored."""

    stored: int = 0
    hits: int = 0
    evicted: int = 0
    damaged: int = 0
    refused: int = 0
    entries: int = 0
    nbytes: int = 0


class Tier(Protocol):
    """Named tensors below the device.

    Attributes:
        min_tokens: a longer prefix is fetched from here only if it saves that many tokens.
        stats: counters.
    """

    min_tokens: int
    stats: TierStats

    def get(self, name: str) -> Tensors | None:
        """What was stored, bit for bit, or None."""

    def put(self, name: str, tensors: Tensors, *, wait: bool = False) -> list[Named]:
        """Store an entry; ``wait`` for room instead of refusing.

        Returns:
            entries it displaced, for the tier below.
        """

    def contains(self, name: str) -> bool:
        """Whether ``get`` would probably find it."""

    def states_of(self, block: str) -> Collection[str]:
        """Names of the states stored that hang on the block of this name."""

    def remove(self, name: str) -> None:
        """Forget an entry, if it is there."""

    def refresh(self) -> None:
        """Notice what others have stored."""

    def drain(self) -> Iterator[Named]:
        """Entries that would be lost with the process, for the tier below."""

    def close(self) -> None:
        """Finish writing."""


class Names:
    """Names of a tier, and which states hang on which block."""

    def __init__(self) -> None:
        self._states: dict[str, set[str]] = {}

    def add(self, name: str) -> None:
        """Note an entry."""
        block, dash, _ = name.partition("-")
        if dash:
            self._states.setdefault(block, set()).add(name)

    def discard(self, name: str) -> None:
        """Forget an entry."""
        block, dash, _ = name.partition("-")
        if dash and (states := self._states.get(block)) is not None:
            states.discard(name)
            if not states:
                del self._states[block]

    def states_of(self, block: str) -> tuple[str, ...]:
        """States that hang on a block."""
        return tuple(self._states.get(block, ()))


class HostTier:
    """Entries in host memory; the least recently used one makes room.

    Args:
        max_bytes: most bytes of tensors.
        pin_memory: page-locked copies, which a CUDA device reads faster.
        min_tokens: see ``Tier``.
    """

    def __init__(self, max_bytes: int, *, pin_memory: bool = False, min_tokens: int = 1) -> None:
        if max_bytes < 1:
            raise ConfigError(f"a host tier of {max_bytes} bytes holds nothing")
        self.max_bytes, self.pin_memory, self.min_tokens = max_bytes, pin_memory, min_tokens
        self.stats = TierStats()
        self._entries: OrderedDict[str, Tensors] = OrderedDict()
        self._names = Names()

    def get(self, name: str) -> Tensors | None:
        """See ``Tier``."""
        found = self._entries.get(name)
        if found is not None:
            self._entries.move_to_end(name)
            self.stats.hits += 1
        return found

    def put(self, name: str, tensors: Tensors, *, wait: bool = False) -> list[Named]:
        """See ``Tier``; an entry that is larger than the tier goes straight through."""
        if name in self._entries:
            return []
        size = nbytes_of(tensors)
        if size > self.max_bytes:
            self.stats.refused += 1
            return [(name, tensors)]
        displaced: list[Named] = []
        while self.stats.nbytes + size > self.max_bytes:
            oldest = next(iter(self._entries))
            displaced.append((oldest, self._entries[oldest]))
            self.remove(oldest)
            self.stats.evicted += 1
        if self.pin_memory:
            tensors = {key: tensor.pin_memory() for key, tensor in tensors.items()}
        self._entries[name] = tensors
        self._names.add(name)
        self.stats.stored += 1
        self.stats.entries += 1
        self.stats.nbytes += size
        return displaced

    def contains(self, name: str) -> bool:
        """See ``Tier``."""
        return name in self._entries

    def states_of(self, block: str) -> Collection[str]:
        """See ``Tier``."""
        return self._names.states_of(block)

    def remove(self, name: str) -> None:
        """See ``Tier``."""
        tensors = self._entries.pop(name, None)
        if tensors is not None:
            self._names.discard(name)
            self.stats.entries -= 1
            self.stats.nbytes -= nbytes_of(tensors)

    def refresh(self) -> None:
        """Nothing to do: nobody else stores here."""

    def drain(self) -> Iterator[Named]:
        """See ``Tier``; the oldest first."""
        yield from list(self._entries.items())

    def close(self) -> None:
        """Give the memory back."""
        self._entries.clear()
        self._names = Names()
        self.stats.entries = self.stats.nbytes = 0


def nbytes_of(tensors: Tensors) -> int:
    """Bytes of an entry."""
    return sum(tensor.nbytes for tensor in tensors.values())
