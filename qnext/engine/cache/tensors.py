"""What the cache manager needs of the tensors it keeps the books of, and nothing more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]
"""Host copies by name: what one block or one slot holds."""


class CacheTensors(Protocol):
    """Copies between blocks, slots and host memory.

    A block holds ``block_size`` rows of keys and values of every attention layer and of MTP. A slot
    holds the recurrent and convolution states of every DeltaNet layer and the hidden state of the
    last token they have seen. Calls happen in order with the model's own work on the device.
    """

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block."""

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one slot."""

    def copy_block(self, src: int, dst: int) -> None:
        """Give block ``dst`` the rows of ``src``."""

    def copy_slot(self, src: int, dst: int) -> None:
        """Give slot ``dst`` the state of ``src``."""

    def reset_slot(self, slot: int) -> None:
        """Put a slot back to the start of a sequence: zeros."""

    def zero_blocks(self, blocks: list[int]) -> None:
        """Overwrite blocks that may hold non-finite values."""

    def read_block(self, block: int) -> Tensors:
        """Host copies that later work on the device does not change."""

    def write_block(self, block: int, tensors: Tensors) -> None:
        """The inverse of ``read_block``, bit for bit."""

    def read_slot(self, slot: int) -> Tensors:
        """Host copies that later work on the device does not change."""

    def write_slot(self, slot: int, tensors: Tensors) -> None:
        """The inverse of ``read_slot``, bit for bit."""
