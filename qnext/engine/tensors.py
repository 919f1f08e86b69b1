"""From the cache manager's books to tensors: the copies it orders, block tables as arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qnext.engine.cache import CacheManager
from qnext.layers.state import ModelState


class StateTensors:
    """Blocks and slots of one ModelState as the cache manager sees them.

    A block is the keys and values of all attention layers (MTP included) for ``block_size``
    tokens; a slot is the recurrent and convolution states of all DeltaNet layers and one hidden
    state.
    """

    def __init__(self, state: ModelState) -> None:
        self.state = state

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block over all layers."""
        return sum(t[0].nbytes for t in self._block_tensors().values() if len(t))

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one slot over all layers."""
        return sum(t[0].nbytes for t in self._slot_tensors().values() if len(t))

    def copy_block(self, src: int, dst: int) -> None:
        """Give block ``dst`` the contents of ``src``."""
        self.state.copy_block(src, dst)

    def copy_slot(self, src: int, dst: int) -> None:
        """Give slot ``dst`` the contents of ``src``."""
        self.state.copy_slot(src, dst)

    def reset_slot(self, slot: int) -> None:
        """Put a slot back to the start of a sequence."""
        self.state.reset(slot)

    def zero_blocks(self, blocks: Sequence[int]) -> None:
        """Wipe blocks that may hold numbers that are not finite."""
        if blocks:
            index = torch.tensor(list(blocks), device=self.state.hidden.device)
            for tensor in self._block_tensors().values():
                _bytes(tensor).index_fill_(0, index, 0)

    def read_block(self, block: int) -> dict[str, Tensor]:
        """Copies of a block on the host."""
        return {name: t[block].to("cpu", copy=True) for name, t in self._block_tensors().items()}

    def write_block(self, block: int, tensors: dict[str, Tensor]) -> None:
        """Put back what ``read_block`` gave."""
        for name, t in self._block_tensors().items():
            t[block].copy_(tensors[name])

    def read_slot(self, slot: int) -> dict[str, Tensor]:
        """Copies of a slot on the host."""
        return {name: t[slot].to("cpu", copy=True) for name, t in self._slot_tensors().items()}

    def write_slot(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """Put back what ``read_slot`` gave."""
        for name, t in self._slot_tensors().items():
            t[slot].copy_(tensors[name])

    def _block_tensors(self) -> dict[str, Tensor]:
        found = {}
        for i, cache in enumerate(self.state.kv_caches):
            found[f"{i}.k"], found[f"{i}.v"] = cache.k, cache.v
        return found

    def _slot_tensors(self) -> dict[str, Tensor]:
        found = {"hidden": self.state.hidden}
        for i, delta in enumerate(self.state.delta_states):
            found[f"{i}.recurrent_state"] = delta.recurrent_state
            found[f"{i}.conv_state"] = delta.conv_state
        return found


def _bytes(tensor: Tensor) -> Tensor:
    """A view in a dtype that every op knows: 8-bit floats have few."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


class BlockTables:
    """Block tables of running sequences as rows of one array, kept up to date by what was added.

    Args:
        cache: has them as lists, which only grow while a sequence is seated.
        num_slots: one row each.
        max_blocks: of the longest sequence.
    """

    def __init__(self, cache: CacheManager, num_slots: int, max_blocks: int) -> None:
        self._cache = cache
        self._rows = np.zeros((num_slots, max_blocks), np.int32)
        self._tables: list[list[int]] = [[] for _ in range(num_slots)]
        self._known = [0] * num_slots

    def rows(self, seq_ids: Sequence[int], slots: Sequence[int], num_tokens: int) -> np.ndarray:
        """(N, B) int32 blocks of the first ``num_tokens`` tokens of each sequence."""
        tables, known = self._tables, self._known
        for seq_id, slot in zip(seq_ids, slots, strict=True):
            table = self._cache.block_table(seq_id)
            if tables[slot] is not table:  # seated since: every seat has a list of its own
                tables[slot], known[slot] = table, 0
            if known[slot] < len(table):
                self._rows[slot, known[slot] : len(table)] = table[known[slot] :]
                known[slot] = len(table)
        size = self._cache.block_size
        return self._rows[np.asarray(slots), : -(-num_tokens // size)]
