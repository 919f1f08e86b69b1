"""BlockPool: who uses which KV block.

A block is used by ``refs`` sequences and held by ``holds`` entries of the prefix index. With
neither it is free; held but not used it is cached, and what was not used for longest goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from qnext.errors import EngineError


class BlockPool:
    """Counts over block ids 0..num_blocks-1.

    Args:
        num_blocks: how many there are.
        scrub: called with a tainted block at the moment it becomes free.
    """

    def __init__(self, num_blocks: int, scrub: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self.holds = [0] * num_blocks
        self.free = list(range(num_blocks - 1, -1, -1))
        self.cached: OrderedDict[int, None] = OrderedDict()
        self.tainted: set[int] = set()
        self._scrub = scrub

    @property
    def num_available(self) -> int:
        """Blocks that a sequence can have now: free ones, and cached ones to evict."""
        return len(self.free) + len(self.cached)

    @property
    def num_used(self) -> int:
        """Blocks in the tables of sequences."""
        return self.num_blocks - self.num_available

    def take(self) -> int:
        """A free block, now used once."""
        if not self.free:
            raise EngineError("a KV block was asked for and none is free")
        block = self.free.pop()
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more sequence uses a block that is used or cached."""
        if not self.refs[block]:
            del self.cached[block]
        self.refs[block] += 1

    def release(self, block: int) -> None:
        """One sequence fewer; the last one leaves the block cached or free."""
        self.refs[block] -= 1
        self._settle(block)

    def hold(self, block: int) -> None:
        """One more index entry needs a block that is used or cached."""
        self.holds[block] += 1

    def unhold(self, block: int) -> None:
        """One index entry fewer."""
        self.holds[block] -= 1
        self._settle(block)

    def _settle(self, block: int) -> None:
        if self.refs[block]:
            return
        if self.holds[block]:
            self.cached.setdefault(block)
            return
        self.cached.pop(block, None)
        if block in self.tainted:
            self.tainted.discard(block)
            self._scrub(block)
        self.free.append(block)
