"""What the layers remember between steps: keys and values in blocks, recurrent states in slots.

A slot belongs to one sequence, or holds a snapshot. KV rows past the committed length are
overwritten, so a rejected draft needs no clean-up; a recurrent state cannot be cut back, so a
provisional sequence leaves it alone, and ``commit`` replays the rows that turned out to be right
from their saved inputs (k, v, gates and convolution inputs: a few KB instead of a state a token).

The MTP layer stores the row of pair (H_i, token i + 1) at cache row i + 1. Every cached row p, in
every layer, then depends on tokens 0..p alone, and blocks can be shared by sequences that go on
differently. Row 0 of the MTP layer is never used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from qnext.kernels.gated_delta import recurrent_gated_delta_rule
from qnext.layers.packed import PackedBatch, Round, stretches


@dataclass
class KVCache:
    """Keys and values of one attention layer.

    Attributes:
        k: (blocks, block_size, Hkv, D), after norm and rotary embedding.
        v: (blocks, block_size, Hkv, D).
    """

    k: Tensor
    v: Tensor

    def store(self, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k, v (T, Hkv, D) at the flat rows (T,)."""
        for cache, new in ((self.k, k), (self.v, v)):
            flat, new = cache.flatten(0, 1), new.to(cache.dtype)
            if cache.dtype.itemsize == 1:  # index_copy does not know the 8-bit floats
                flat, new = flat.view(torch.uint8), new.view(torch.uint8)
            flat.index_copy_(0, rows, new)

    def copy_block(self, src: int, dst: int) -> None:
        """Give block ``dst`` the contents of ``src``."""
        self.k[dst].copy_(self.k[src])
        self.v[dst].copy_(self.v[src])


@dataclass(frozen=True, slots=True)
class Pending:
    """Inputs of provisional rows, from which ``commit`` replays the accepted ones.

    Attributes:
        round: which rows, whose.
        k: (t, Hk, dk), normalised.
        v: (t, Hv, dv).
        g: (t, Hv) log decay.
        beta: (t, Hv) write strength.
        qkv: (t, C) inputs of the convolution.
    """

    round: Round
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    qkv: Tensor

    def replay(self, rows: slice | Tensor, cu_seqlens: Tensor, start: Tensor) -> Tensor:
        """The states (n, Hv, dk, dv) after some of the rows, computed as they were before."""
        k = self.k[rows]
        rest = (self.v[rows], self.g[rows], self.beta[rows], cu_seqlens, start)
        return recurrent_gated_delta_rule(k, k, *rest)[1]


@dataclass
class DeltaState:
    """Recurrent and convolution state of one DeltaNet layer.

    Attributes:
        recurrent_state: (slots, Hv, dk, dv) fp32.
        conv_state: (slots, C, K - 1), the last inputs of the convolution.
        pending: what the provisional rows of the last batch put in.
        replay: does the same as ``pending`` in a compiled loop, where one kept the inputs.
    """

    recurrent_state: Tensor
    conv_state: Tensor
    pending: list[Pending] = field(default_factory=list)
    replay: Callable[[Sequence[int]], None] | None = None

    def reset(self, slot: int) -> None:
        """Put a slot back to the start of a sequence."""
        self.recurrent_state[slot].zero_()
        self.conv_state[slot].zero_()

    def copy(self, src: int, dst: int) -> None:
        """Give slot ``dst`` the contents of ``src``."""
        self.recurrent_state[dst].copy_(self.recurrent_state[src])
        self.conv_state[dst].copy_(self.conv_state[src])

    def commit(self, slots: Sequence[int], accepted: Sequence[int]) -> None:
        """Advance each provisional sequence n over its first ``accepted[n]`` rows."""
        if self.replay is not None:
            self.replay(accepted)
            self.replay = None
        for pending in self.pending:
            members = pending.round.members
            kept = [n for n, member in enumerate(members) if accepted[member]]
            if kept:
                bounds = pending.round.cu_seqlens.tolist()
                counts = [accepted[members[n]] for n in kept]
                rows = stretches([bounds[n] for n in kept], counts, pending.k.device)
                self._replay(pending, rows, [slots[members[n]] for n in kept], counts)
        self.pending = []

    def _replay(
        self, p: Pending, rows: slice | Tensor, slots: list[int], counts: list[int]
    ) -> None:
        device = p.k.device
        cu = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
        index: slice | Tensor = slice(slots[0], slots[0] + 1)
        if len(slots) > 1:
            index = torch.tensor(slots).to(device)
        end = p.replay(rows, cu.to(device), self.recurrent_state[index])
        self.recurrent_state[index] = end.to(self.recurrent_state.dtype)
        start, width = 0, self.conv_state.shape[2]
        fresh = p.qkv[rows].to(self.conv_state.dtype)
        for slot, count in zip(slots, counts, strict=True):
            new = fresh[start : start + count].t()
            window = torch.cat([self.conv_state[slot], new], 1)
            self.conv_state[slot] = window[:, window.shape[1] - width :]
            start += count


@dataclass
class ModelState:
    """The states of all layers, and of the MTP layer where there is one.

    Attributes:
        layers: one per decoder layer.
        mtp: of the MTP layer.
        hidden: (slots, H) normed hidden state of the last token that each slot has seen; the
            engine keeps it (drafting and attaching to a snapshot start from it).
        block_size: tokens of a KV block.
    """

    layers: list[KVCache | DeltaState]
    mtp: KVCache | None
    hidden: Tensor
    block_size: int

    @property
    def num_slots(self) -> int:
        """Sequences and snapshots it can hold."""
        return len(self.hidden)

    @property
    def kv_caches(self) -> list[KVCache]:
        """Of all attention layers, the MTP layer's last."""
        found = [layer for layer in self.layers if isinstance(layer, KVCache)]
        return found if self.mtp is None else [*found, self.mtp]

    @property
    def delta_states(self) -> list[DeltaState]:
        """Of all DeltaNet layers."""
        return [layer for layer in self.layers if isinstance(layer, DeltaState)]

    @property
    def num_blocks(self) -> int:
        """KV blocks of every attention layer; 0 for a model without attention."""
        caches = self.kv_caches
        return len(caches[0].k) if caches else 0

    def reset(self, slot: int) -> None:
        """Put a slot back to the start of a sequence."""
        self.hidden[slot].zero_()
        for layer in self.delta_states:
            layer.reset(slot)

    def copy_slot(self, src: int, dst: int) -> None:
        """Give slot ``dst`` the states of ``src``."""
        self.hidden[dst].copy_(self.hidden[src])
        for layer in self.delta_states:
            layer.copy(src, dst)

    def copy_block(self, src: int, dst: int) -> None:
        """Give block ``dst`` the keys and values of ``src``."""
        for cache in self.kv_caches:
            cache.copy_block(src, dst)

    def commit(self, batch: PackedBatch, accepted: Sequence[int]) -> None:
        """The first ``accepted[n]`` new tokens of each provisional sequence n happened."""
        assert batch.index is not None
        for layer in self.delta_states:
            layer.commit(batch.index.slots, accepted)

    def batch(
        self,
        lengths: Sequence[int],
        *,
        slots: Sequence[int],
        context_lens: Sequence[int] | None = None,
        provisional: Sequence[bool] = (),
        saves: Sequence[tuple[int, int, int]] = (),
        kv_shift: int = 0,
    ) -> PackedBatch:
        """A batch for callers without a block manager: every slot owns an equal share of blocks."""
        share = self.num_blocks // self.num_slots
        tables = np.asarray(slots, np.int32)[:, None] * share + np.arange(share, dtype=np.int32)
        return PackedBatch.cached(
            lengths, context_lens or [0] * len(lengths), slots, tables.astype(np.int32),
            self.block_size, provisional=provisional, saves=saves, kv_shift=kv_shift,
            with_states=not kv_shift, device=self.hidden.device,
        )  # fmt: skip

    @cached_property
    def plain(self) -> bool:
        """Whether everything is fp32, as the compiled loops for CPUs want it."""
        kv = all(cache.k.dtype == torch.float32 for cache in self.kv_caches)
        return kv and all(d.recurrent_state.dtype == torch.float32 for d in self.delta_states)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = [self.hidden]
        for cache in self.kv_caches:
            tensors += [cache.k, cache.v]
        for delta in self.delta_states:
            tensors += [delta.recurrent_state, delta.conv_state]
        return sum(t.nbytes for t in tensors)
