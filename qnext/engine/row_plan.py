"""RowPlan: everything about a set of rows that does not change from step to step, as tensors.

Decoding samples the same sequences again and again, so the sampler keeps the last plan and the
host's work per step stays small: lengths, draws, and rows that ask for more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qnext.engine.sampling_state import Kind, SamplingState


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor there; to a GPU without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(slots=True)
class Group:
    """Rows that are drawn in the same way, r of R.

    Attributes:
        members: row numbers (r,) on the device, None for all rows.
        temperature: (r, 1) fp32; so are ``top_p`` and ``min_p``.
        limits: (r, 1) int64 most tokens, V for no limit.
        most: tokens in falling order that are looked at, not below any of ``limits``.
        least: smallest of ``limits``.
        uses_top_p: whether any row does; so ``uses_min_p``.
        rows: row numbers on the host.
    """

    kind: Kind
    rows: list[int]
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
        rows: list[int],
        states: Sequence[SamplingState],
        vocab_size: int,
        device: torch.device,
    ) -> Group:
        """The group of ``rows`` among ``states``."""
        params = [states[row].params for row in rows]
        limits = [min(one.top_k or vocab_size, vocab_size) for one in params]
        floats = np.array([[one.temperature, one.top_p, one.min_p] for one in params], np.float32)
        columns = to_device(floats, device)
        return cls(
            kind=kind,
            rows=rows,
            members=(
                None if len(rows) == len(states) else to_device(np.array(rows, np.int64), device)
            ),
            temperature=columns[:, 0:1],
            top_p=columns[:, 1:2],
            min_p=columns[:, 2:3],
            limits=to_device(np.array(limits, np.int64), device)[:, None],
            most=min(width, vocab_size) if width else vocab_size,
            least=min(limits),
            uses_top_p=any(one.top_p < 1 for one in params),
            uses_min_p=any(one.min_p for one in params),
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
        groups: dict[tuple[Kind, int], list[int]] = {}
        for row, state in enumerate(states):
            groups.setdefault((state.kind, state.width), []).append(row)
        self.groups = [
            Group.of(kind, width, rows, states, vocab_size, device)
            for (kind, width), rows in groups.items()
        ]
        self.draws = any(group.kind != "greedy" for group in self.groups)
        self.streams = np.array([state.stream for state in states], np.uint64)
        self.changes = any(state.changes_logits for state in states)
        self.each_step = [n for n, state in enumerate(states) if state.changes_each_step]
        self.penalised = [n for n, state in enumerate(states) if state.penalised]
        self.bias = self._bias()
        self.banned = self._banned(vocab_size)
        wanted = [(n, state.params.logprobs) for n, state in enumerate(states)]
        self.logprobs = [
            (n, vocab_size if count < 0 else min(count, vocab_size))
            for n, count in wanted
            if count is not None
        ]
        self.logprob_rows = to_device(np.array([n for n, _ in self.logprobs], np.int64), device)
        self.penalties: Penalties | None = None  # made by the sampler, which owns the table

    def _bias(self) -> tuple[Tensor, Tensor, Tensor] | None:
        found = [
            (row, token, value)
            for row, state in enumerate(self.states)
            for token, value in (state.params.logit_bias or {}).items()
        ]
        if not found:
            return None
        rows, tokens, values = zip(*found, strict=True)
        where = to_device(np.array([rows, tokens], np.int64), self.device)
        return where[0], where[1], to_device(np.array(values, np.float32), self.device)

    def _banned(self, vocab_size: int) -> tuple[Tensor, Tensor] | None:
        rows = [n for n, s in enumerate(self.states) if s.params.allowed_token_ids is not None]
        if not rows:
            return None
        masks = np.ones((len(rows), vocab_size), np.bool_)
        for place, row in enumerate(rows):
            masks[place, list(self.states[row].params.allowed_token_ids or ())] = False
        members = to_device(np.array(rows, np.int64), self.device)
        return members, to_device(masks, self.device)
