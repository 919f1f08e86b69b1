"""How T packed tokens are cut into sequences, and where the past of each lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """T tokens of N sequences, one after the other.

    Attributes:
        positions: (T,) int64 absolute position of every token.
        lengths: N counts of new tokens.
        cu_seqlens: (N + 1,) int32 bounds of the sequences.
        context_lens: N counts of tokens that the cache already holds; zeros without a cache.
        slots: N cache slots, or None for no cache.
        trace: verification of drafts: recurrent states are left untouched and the state after
            every token is kept until ``ModelState.commit``.
    """

    positions: Tensor
    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    context_lens: tuple[int, ...]
    slots: tuple[int, ...] | None = None
    trace: bool = False

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        *,
        context_lens: Sequence[int] | None = None,
        slots: Sequence[int] | None = None,
        trace: bool = False,
        device: torch.device | str = "cpu",
    ) -> PackedBatch:
        """Build the tensors from plain counts."""
        past = tuple(context_lens) if context_lens is not None else (0,) * len(lengths)
        positions = [p for n, c in zip(lengths, past, strict=True) for p in range(c, c + n)]
        bounds = list(accumulate(lengths, initial=0))
        return cls(
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            lengths=tuple(lengths),
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device),
            context_lens=past,
            slots=tuple(slots) if slots is not None else None,
            trace=trace,
        )

    @property
    def max_length(self) -> int:
        """New tokens of the longest sequence."""
        return max(self.lengths, default=0)
