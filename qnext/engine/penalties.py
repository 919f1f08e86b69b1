"""Token counts of the sequences that use penalties: one row of a table each, on the device.

A sequence gets its row when it is first sampled and loses it when nothing refers to it any more.
Counts follow the output lazily: all new tokens of a step are one scatter.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qnext.engine.row_plan import to_device
from qnext.engine.sampling_state import SamplingState

_FEWEST = 4


class PenaltyTable:
    """Counts of output tokens and membership in the prompt.

    Args:
        vocab_size: V.
        device: where the logits are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.device = device
        self.counts = torch.zeros(0, vocab_size, dtype=torch.float32, device=device)
        self.in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._free: list[int] = []
        self._counted: list[int] = []
        self._rows: weakref.WeakKeyDictionary[SamplingState, int] = weakref.WeakKeyDictionary()

    @property
    def num_used(self) -> int:
        """Rows that belong to a sequence."""
        return len(self._counted) - len(self._free)

    def rows(self, states: Sequence[SamplingState]) -> list[int]:
        """The row of each state; states may repeat."""
        return [self._row(state) for state in states]

    def update(self, states: Sequence[SamplingState]) -> None:
        """Count the output that is new since the last call."""
        rows: list[int] = []
        tokens: list[int] = []
        for state in dict.fromkeys(states):
            row = self._row(state)
            known, output = self._counted[row], state.output_ids
            if len(output) == known:
                continue
            if len(output) < known:  # begun again
                self.counts[row] = 0
                known = 0
            rows += [row] * (len(output) - known)
            tokens += output[known:]
            self._counted[row] = len(output)
        if rows:
            add_at(self.counts, rows, tokens)

    def _row(self, state: SamplingState) -> int:
        found = self._rows.get(state)
        if found is not None:
            return found
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._rows[state] = row
        weakref.finalize(state, self._free.append, row)
        self._counted[row] = 0
        self.counts[row] = 0
        self.in_prompt[row] = False
        if state.params.repetition_penalty != 1 and len(state.prompt_ids):
            ids = to_device(np.array(state.prompt_ids, np.int64), self.device)
            self.in_prompt[row].index_fill_(0, ids, True)
        return row

    def _grow(self) -> None:
        have = len(self._counted)
        more = max(_FEWEST, have)
        self.counts = torch.cat([self.counts, self.counts.new_zeros(more, self.counts.shape[1])])
        self.in_prompt = torch.cat(
            [self.in_prompt, self.in_prompt.new_zeros(more, self.in_prompt.shape[1])]
        )
        self._counted += [0] * more
        self._free += range(have + more - 1, have - 1, -1)


def add_at(table: Tensor, rows: Sequence[int], columns: Sequence[int]) -> None:
    """Add 1 to each (row, column); pairs may repeat."""
    where = to_device(np.array([rows, columns], np.int64), table.device)
    table.index_put_((where[0], where[1]), table.new_ones(()), accumulate=True)
