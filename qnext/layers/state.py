"""What the layers remember between steps, in slots: keys and values, or a recurrent state.

A slot belongs to one sequence. KV rows past the committed length are overwritten, so a rejected
draft needs no clean-up; a recurrent state cannot be cut back, so a traced batch leaves it alone
and ``commit`` chooses which of the traced states to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qnext.layers.packed import PackedBatch


@dataclass
class KVCache:
    """Keys and values of one attention layer.

    Attributes:
        k: (slots, capacity, Hkv, D), after norm and rotary embedding.
        v: (slots, capacity, Hkv, D).
    """

    k: Tensor
    v: Tensor

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens a slot; what is there stays."""
        extra = capacity - self.k.shape[1]
        if extra > 0:
            shape = (self.k.shape[0], extra, *self.k.shape[2:])
            self.k = torch.cat([self.k, self.k.new_zeros(shape)], 1)
            self.v = torch.cat([self.v, self.v.new_zeros(shape)], 1)

    def reset(self, slot: int) -> None:
        """Nothing to do: rows are written before they are read."""

    def copy(self, src: int, dst: int) -> None:
        """Give slot ``dst`` the contents of ``src``."""
        self.k[dst].copy_(self.k[src])
        self.v[dst].copy_(self.v[src])


@dataclass
class DeltaState:
    """Recurrent and convolution state of one DeltaNet layer.

    Attributes:
        recurrent_state: (slots, Hv, dk, dv) fp32.
        conv_state: (slots, C, K - 1), the last inputs of the convolution.
        traced_states: (T, Hv, dk, dv) states after each token of a traced batch.
        traced_inputs: (T, C) convolution inputs of a traced batch.
    """

    recurrent_state: Tensor
    conv_state: Tensor
    traced_states: Tensor | None = None
    traced_inputs: Tensor | None = None

    def reset(self, slot: int) -> None:
        """Put a slot back to the start of a sequence."""
        self.recurrent_state[slot].zero_()
        self.conv_state[slot].zero_()

    def copy(self, src: int, dst: int) -> None:
        """Give slot ``dst`` the contents of ``src``."""
        self.recurrent_state[dst].copy_(self.recurrent_state[src])
        self.conv_state[dst].copy_(self.conv_state[src])

    def commit(self, batch: PackedBatch, accepted: Sequence[int]) -> None:
        """Keep the state as it was after the first ``accepted[n]`` tokens of each sequence."""
        assert batch.slots is not None
        assert self.traced_states is not None
        assert self.traced_inputs is not None
        start = 0
        for n, slot in enumerate(batch.slots):
            keep = accepted[n]
            if keep:
                self.recurrent_state[slot].copy_(self.traced_states[start + keep - 1])
                past, new = self.conv_state[slot], self.traced_inputs[start : start + keep].t()
                self.conv_state[slot] = torch.cat([past, new.to(past.dtype)], 1)[:, keep:]
            start += batch.lengths[n]
        self.traced_states = self.traced_inputs = None


@dataclass
class ModelState:
    """The states of all layers, and of the MTP layer where there is one."""

    layers: list[KVCache | DeltaState]
    mtp: KVCache | None
    num_slots: int
    capacity: int

    def ensure_capacity(self, tokens: int) -> None:
        """Make room for ``tokens`` tokens in every slot, growing by at least a half."""
        if tokens <= self.capacity:
            return
        self.capacity = max(tokens, self.capacity + self.capacity // 2)
        for layer in (*self.layers, self.mtp):
            if isinstance(layer, KVCache):
                layer.grow(self.capacity)

    def reset(self, slot: int) -> None:
        """Put a slot back to the start of a sequence."""
        for layer in self.layers:
            layer.reset(slot)

    def copy_slot(self, src: int, dst: int) -> None:
        """Give slot ``dst`` everything that slot ``src`` remembers."""
        for layer in self.layers:
            layer.copy(src, dst)
        if self.mtp is not None:
            self.mtp.copy(src, dst)

    def commit(self, batch: PackedBatch, accepted: Sequence[int]) -> None:
        """End a traced batch: the first ``accepted[n]`` tokens of sequence n happened."""
        for layer in self.layers:
            if isinstance(layer, DeltaState):
                layer.commit(batch, accepted)

    @property
    def nbytes(self) -> int:
        """Bytes held by all slots."""
        tensors: list[Tensor] = []
        for layer in (*self.layers, self.mtp):
            if isinstance(layer, KVCache):
                tensors += [layer.k, layer.v]
            elif isinstance(layer, DeltaState):
                tensors += [layer.recurrent_state, layer.conv_state]
        return sum(t.nbytes for t in tensors)
