"""How T packed tokens are cut into sequences, and where the past of each lies.

A batch with a ``CacheIndex`` reads and writes a ``ModelState``: keys and values in blocks,
DeltaNet states in slots. Everything that the layers would otherwise work out one after the other
(addresses of rows, which rows advance a state together) is worked out here once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

# Up to this many new tokens a sequence, token by token is cheaper than one chunk of 64.
RECURRENT_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Round:
    """Rows that advance the DeltaNet states of some slots together.

    Sequences under verification, short and long ones go separately; a sequence with snapshots on
    its way takes one round for each stretch between them.

    Attributes:
        rows: of the packed batch, a slice where they are neighbours.
        cu_seqlens: (n + 1,) int32 bounds of the stretches within these rows.
        slots: (n,) int64 slots, a slice where there is one.
        short: every stretch has at most RECURRENT_TOKENS rows.
        provisional: the states stay as they are until ``ModelState.commit``.
        members: n sequence numbers.
        saves: pairs of slots (from, to): snapshots taken at the end of this round.
    """

    rows: slice | Tensor
    cu_seqlens: Tensor
    slots: slice | Tensor
    short: bool
    provisional: bool
    members: tuple[int, ...]
    saves: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class CacheIndex:
    """Where the past of each sequence lies in a ``ModelState``.

    Attributes:
        block_tables: (N, B) int32; row n lists the KV blocks of sequence n in order, padded with 0.
        block_size: tokens of a block.
        slots: N state slots.
        slot_mapping: (T,) int64 row of each new token in the flattened blocks.
        rounds: how the DeltaNet states advance.
        kv_shift: rows that every position is stored further on: 1 for the MTP layer, whose row i
            depends on token i + 1 (see ``qnext.layers.state``).
        provisional: N flags: drafts to be verified, nothing is remembered until commit.
    """

    block_tables: Tensor
    block_size: int
    slots: tuple[int, ...]
    slot_mapping: Tensor
    rounds: tuple[Round, ...]
    kv_shift: int = 0
    provisional: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """T tokens of N sequences, one after the other.

    Attributes:
        positions: (T,) int64 absolute position of every token.
        lengths: N counts of new tokens.
        cu_seqlens: (N + 1,) int32 bounds of the sequences.
        context_lens: N counts of tokens that the cache already holds; zeros without a cache.
        index: where the cache is, or None for no cache.
    """

    positions: Tensor
    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    context_lens: tuple[int, ...]
    index: CacheIndex | None = None
    max_length: int = field(default=0)

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        *,
        context_lens: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> PackedBatch:
        """A batch without a cache, from plain counts."""
        past = tuple(context_lens) if context_lens is not None else (0,) * len(lengths)
        positions, bounds = _positions(lengths, past)
        return cls(
            positions=torch.from_numpy(positions).to(device),
            lengths=tuple(lengths),
            cu_seqlens=torch.from_numpy(bounds).to(device),
            context_lens=past,
            max_length=max(lengths, default=0),
        )

    @classmethod
    def cached(
        cls,
        lengths: Sequence[int],
        context_lens: Sequence[int],
        slots: Sequence[int],
        block_tables: np.ndarray,
        block_size: int,
        *,
        provisional: Sequence[bool] = (),
        saves: Sequence[tuple[int, int, int]] = (),
        kv_shift: int = 0,
        with_states: bool = True,
        device: torch.device | str = "cpu",
    ) -> PackedBatch:
        """A batch that continues cached sequences.

        Args:
            lengths: N counts of new tokens.
            context_lens: N counts of cached tokens.
            slots: N state slots.
            block_tables: (N, B) int32.
            block_size: tokens of a block.
            provisional: N flags, or empty for none.
            saves: (sequence, new tokens, slot): after so many of its new tokens the state of a
                sequence is copied to a slot; in rising order for each sequence.
            kv_shift: see ``CacheIndex``.
            with_states: False for a batch of the MTP layer, which has no DeltaNet states.
            device: of the tensors.
        """
        positions, bounds = _positions(lengths, context_lens)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        place = positions + kv_shift
        mapping = place
        if block_tables.shape[1]:  # a model without attention has no blocks
            blocks = block_tables[owner, place // block_size].astype(np.int64)
            mapping = blocks * block_size + place % block_size
        flags = tuple(provisional) or (False,) * len(lengths)
        rounds = _rounds(lengths, bounds, slots, flags, saves, device) if with_states else ()
        index = CacheIndex(
            torch.from_numpy(np.ascontiguousarray(block_tables)).to(device),
            block_size, tuple(slots), torch.from_numpy(mapping).to(device), rounds,
            kv_shift, flags,
        )  # fmt: skip
        return cls(
            torch.from_numpy(positions).to(device),
            tuple(lengths),
            torch.from_numpy(bounds).to(device),
            tuple(context_lens),
            index,
            max(lengths, default=0),
        )


def stretches(
    starts: Sequence[int] | np.ndarray, counts: Sequence[int], device: torch.device | str
) -> slice | Tensor:
    """Index of several stretches of rows: a slice where they are neighbours."""
    first = int(starts[0]) if len(starts) else 0
    bounds = list(accumulate(counts, initial=first))
    if all(start == bound for start, bound in zip(starts, bounds, strict=False)):
        return slice(first, bounds[-1])
    spans = [np.arange(s, s + c) for s, c in zip(starts, counts, strict=True)]
    return torch.from_numpy(np.concatenate(spans)).to(device)


def _positions(lengths: Sequence[int], past: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(T,) int64 positions and (N + 1,) int32 bounds."""
    counts = np.asarray(lengths, np.int64)
    bounds = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=bounds[1:])
    first = np.asarray(past, np.int64) - bounds[:-1]
    return np.arange(bounds[-1], dtype=np.int64) + np.repeat(first, counts), bounds


def _rounds(
    lengths: Sequence[int],
    bounds: np.ndarray,
    slots: Sequence[int],
    provisional: Sequence[bool],
    saves: Sequence[tuple[int, int, int]],
    device: torch.device | str,
) -> tuple[Round, ...]:
    """Group the sequences' stretches; see ``Round``."""
    if not saves and not any(provisional):
        longest = max(lengths, default=0)
        if longest <= RECURRENT_TOKENS or min(lengths) > RECURRENT_TOKENS:
            every = range(len(lengths))
            return (_round(every, bounds[:-1], lengths, slots, False, (), device),)
    cuts: list[list[tuple[int, int | None]]] = [[] for _ in lengths]
    for n, after, slot in saves:
        cuts[n].append((after, slot))
    for n, length in enumerate(lengths):
        if not cuts[n] or cuts[n][-1][0] < length:
            cuts[n].append((length, None))
    rounds = []
    for step in range(max(map(len, cuts), default=0)):
        kinds: dict[tuple[bool, bool], list[tuple[int, int, int, int | None]]] = {}
        for n, ends in enumerate(cuts):
            if step < len(ends):
                begin = ends[step - 1][0] if step else 0
                end, snapshot = ends[step]
                kind = (provisional[n], end - begin <= RECURRENT_TOKENS)
                kinds.setdefault(kind, []).append((n, begin, end, snapshot))
        for (waits, _), parts in kinds.items():
            rounds.append(
                _round(
                    [n for n, *_ in parts],
                    [int(bounds[n]) + begin for n, begin, *_ in parts],
                    [end - begin for _, begin, end, _ in parts],
                    slots,
                    waits,
                    tuple((slots[n], save) for n, *_, save in parts if save is not None),
                    device,
                )
            )
    return tuple(rounds)


def _round(
    members: Sequence[int],
    starts: Sequence[int] | np.ndarray,
    counts: Sequence[int],
    slots: Sequence[int],
    provisional: bool,
    saves: tuple[tuple[int, int], ...],
    device: torch.device | str,
) -> Round:
    cu = list(accumulate(counts, initial=0))
    chosen = [slots[n] for n in members]
    one = len(chosen) == 1
    return Round(
        stretches(starts, counts, device),
        torch.tensor(cu, dtype=torch.int32).to(device),
        slice(chosen[0], chosen[0] + 1) if one else torch.tensor(chosen).to(device),
        max(counts, default=0) <= RECURRENT_TOKENS,
        provisional,
        tuple(members),
        saves,
    )
