"""RowPlan: everything about a set of rows that does not change from step to step, as tensors.

Decoding samples the same sequences again and again, so the sampler keeps the last plan and the
host's work per step stays small: lengths, draws, and rows that ask for more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnext.engine.sampling_state import CHANGES, Kind, SamplingState, Trait


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor there; to a GPU without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu" or not array.size:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(slots=True)
class Group:
    """Rows that are drawn in the same way, r of R.

    Attributes:
        members: row numbers (r,) on the device, None for all rows.
        temperature: (r, 1) fp32; so are ``top_p`` and ``min_p``.
        limits: (r, 1) fp32 most tokens, V for no limit.
        most: tokens in falling order that are looked at, not below any of ``limits``.
        least: smallest of ``limits``.
        uses_top_p: whether any row does; so ``uses_min_p``.
    """

    kind: Kind
    members: Tensor | None
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    limits: Tensor
    most: int
    least: int
    uses_top_p: bool
    uses_min_p: bool

    @classmethod
    def of(
        cls,
        kind: Kind,
        width: int,
        rows: NDArray[np.int64] | None,
        columns: NDArray[np.float32],
        vocab_size: int,
        device: torch.device,
    ) -> Group:
        """The group of some ``rows`` of all ``columns`` (R, 4), None for all of them."""
        if rows is not None:
            columns = columns[rows]
        top_k = columns[:, 3]
        columns[:, 3] = np.where((top_k == 0) | (top_k > vocab_size), vocab_size, top_k)
        there = to_device(columns, device)
        return cls(
            kind=kind,
            members=None if rows is None else to_device(rows, device),
            temperature=there[:, 0:1],
            top_p=there[:, 1:2],
            min_p=there[:, 2:3],
            limits=there[:, 3:4],
            most=min(width, vocab_size) if width else vocab_size,
            least=int(columns[:, 3].min()),
            uses_top_p=bool((columns[:, 1] < 1).any()),
            uses_min_p=bool(columns[:, 2].any()),
        )


@dataclass(slots=True)
class Penalties:
    """Rows with penalties, r of R: their numbers, rows of the table (r,) and columns (r, 1)."""

    rows: list[int]
    members: Tensor
    table_rows: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor


class RowPlan:
    """What is fixed about R rows.

    Attributes:
        states: of each row; a sequence with d drafts has d + 1 rows.
        plain_greedy: every row takes the most likely token and nothing else is asked for.
        groups: all rows, by how they are drawn.
        streams: (R,) of the random numbers; ``draws`` says whether any row needs one.
        changes: whether any row's logits are changed.
        each_step: rows that the host has to look at before every token.
        bias: row numbers, ids and values of ``logit_bias``.
        banned: row numbers and masks (r, V) of what ``allowed_token_ids`` leaves out.
        penalised: row numbers.
        logprobs: row numbers and how many are wanted, V for all.
    """

    def __init__(self, states: list[SamplingState], vocab_size: int, device: torch.device) -> None:
        self.states, self.device = states, device
        self.plain_greedy = all(state.plain_greedy for state in states)
        kinds = [state.kind for state in states]
        columns = np.array([state.columns for state in states], np.float32).reshape(-1, 4)
        self.groups: list[Group] = []
        for kind, width in dict.fromkeys(kinds):
            rows = None
            if kinds.count((kind, width)) < len(kinds):
                rows = np.array([n for n, one in enumerate(kinds) if one == (kind, width)])
            self.groups.append(Group.of(kind, width, rows, columns, vocab_size, device))
        self.draws = any(group.kind != "greedy" for group in self.groups)
        self.streams = np.array([state.stream for state in states], np.uint64)
        traits = [state.traits for state in states]
        found = {trait: self._with(int(trait), traits) for trait in Trait}
        self.changes = any(found[trait] for trait in CHANGES)
        self.each_step = found[Trait.EACH_STEP]
        self.penalised = found[Trait.PENALISED]
        self.bias = self._bias(found[Trait.BIASED])
        self.banned = self._banned(found[Trait.LIMITED], vocab_size)
        self.logprobs: list[tuple[int, int]] = []
        for row in found[Trait.LOGPROBS]:
            count = states[row].params.logprobs or 0
            self.logprobs.append((row, vocab_size if count < 0 else min(count, vocab_size)))
        self.logprob_rows = to_device(np.array([n for n, _ in self.logprobs], np.int64), device)
        self.penalties: Penalties | None = None  # made by the sampler, which owns the table

    @staticmethod
    def _with(trait: int, traits: list[int]) -> list[int]:
        """Rows that have a trait."""
        if not any(one & trait for one in set(traits)):
            return []
        return [row for row, one in enumerate(traits) if one & trait]

    def _bias(self, biased: list[int]) -> tuple[Tensor, Tensor, Tensor] | None:
        found = [
            (row, token, value)
            for row in biased
            for token, value in (self.states[row].params.logit_bias or {}).items()
        ]
        if not found:
            return None
        rows, tokens, values = zip(*found, strict=True)
        where = to_device(np.array([rows, tokens], np.int64), self.device)
        return where[0], where[1], to_device(np.array(values, np.float32), self.device)

    def _banned(self, rows: list[int], vocab_size: int) -> tuple[Tensor, Tensor] | None:
        if not rows:
            return None
        masks = np.ones((len(rows), vocab_size), np.bool_)
        for place, row in enumerate(rows):
            masks[place, list(self.states[row].params.allowed_token_ids or ())] = False
        members = to_device(np.array(rows, np.int64), self.device)
        return members, to_device(masks, self.device)
