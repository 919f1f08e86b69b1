"""Masks, bias, user functions and penalties: what changes logits before they are drawn from.

The host decides which (row, token) pairs are banned and which bits a grammar allows; they go to
the device in one piece each, and everything else is tensor work over the rows that ask for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qnext.engine.constraint import Rule
from qnext.engine.grammar import Words
from qnext.engine.penalties import PenaltyTable, add_at
from qnext.engine.row_plan import Penalties, RowPlan, to_device
from qnext.engine.sampling_state import SamplingState

Drafts = Sequence[Sequence[int]]
"""For each row the drafts between its sequence's output and it."""


@dataclass(slots=True)
class StepChanges:
    """What the host found out about the rows of one step.

    Attributes:
        banned: pairs of row and token.
        masked: rows with a grammar, and their bits.
        forced: pairs of row and the only token it may become.
        processed: rows with functions of the user.
    """

    banned: list[tuple[int, int]] = field(default_factory=list)
    masked: list[tuple[int, Words]] = field(default_factory=list)
    forced: list[tuple[int, int]] = field(default_factory=list)
    processed: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, plan: RowPlan, drafts: Drafts | None) -> StepChanges:
        """Ask every sequence that has a say at each token."""
        found = cls()
        for row in plan.each_step:
            state = plan.states[row]
            ahead = drafts[row] if drafts is not None else ()
            rule = state.rule(ahead)
            if rule.forced is not None:
                found.forced.append((row, rule.forced))
                continue
            if rule.allowed is not None:
                found.masked.append((row, rule.allowed))
            found.banned += [(row, token) for token in _banned(state, ahead, rule)]
            if state.params.logits_processors:
                found.processed.append(row)
        return found


def _banned(state: SamplingState, drafts: Sequence[int], rule: Rule) -> list[int]:
    """Stops before ``min_tokens``, and the last token of a bad word about to end."""
    found: list[int] = []
    early = len(state.output_ids) + len(drafts) < state.params.min_tokens
    if rule.no_end or (early and not rule.only_end):
        found += state.stop_ids
    if state.bad_words:
        longest = max(map(len, state.bad_words)) - 1
        recent = (*state.output_ids[max(0, len(state.output_ids) - longest) :], *drafts)
        for *head, last in state.bad_words:
            if not head or recent[len(recent) - len(head) :] == tuple(head):
                found.append(last)
    return found


def changed(
    logits: Tensor,
    plan: RowPlan,
    drafts: Drafts | None,
    step: StepChanges,
    table: PenaltyTable | None,
) -> Tensor:
    """All changes but the forced tokens.

    Args:
        logits: (R, V) fp32, left as they are.
        plan: of the R rows.
        drafts: of each row, None where no row has any.
        step: what the host found out.
        table: token counts, where a row has penalties.

    Returns:
        (R, V), a copy.
    """
    logits = logits.clone()
    if plan.banned is not None:
        rows, masks = plan.banned
        logits[rows] = logits[rows].masked_fill(masks, -torch.inf)
    if step.masked:
        _mask(logits, step.masked)
    if step.banned:
        where = to_device(np.array(step.banned, np.int64), logits.device)
        never = logits.new_full((), -torch.inf)  # made there: a number of the host would be sent
        logits.index_put_((where[:, 0], where[:, 1]), never)
    if plan.bias is not None:
        at_rows, at_tokens, values = plan.bias
        logits[at_rows, at_tokens] += values
    for row in step.processed:
        _process(logits, row, plan.states[row], drafts[row] if drafts is not None else ())
    if plan.penalised and table is not None:
        _penalise(logits, plan, drafts, table)
    return logits


def _mask(logits: Tensor, masked: list[tuple[int, Words]]) -> None:
    vocab = logits.shape[1]
    rows = to_device(np.array([row for row, _ in masked], np.int64), logits.device)
    words = to_device(np.stack([bits for _, bits in masked]).view(np.int32), logits.device)
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = (words[:, :, None] >> shifts & 1).view(len(masked), -1)[:, :vocab].bool()
    logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)


def _process(logits: Tensor, row: int, state: SamplingState, drafts: Sequence[int]) -> None:
    """Functions of the user; what goes wrong in one fails its own row."""
    ids = [*state.output_ids, *drafts]
    try:
        for function in state.params.logits_processors:
            logits[row] = function(ids, logits[row].clone())
    except Exception as error:
        state.processor_error = f"a logits processor raised {error!r}"
        logits[row] = -torch.inf


def _penalise(logits: Tensor, plan: RowPlan, drafts: Drafts | None, table: PenaltyTable) -> None:
    found = plan.penalties
    if found is None:
        found = plan.penalties = _penalties(plan, table)
    table.update([plan.states[row] for row in found.rows])
    counts = table.counts[found.table_rows]
    if drafts is not None:
        pairs = [(n, token) for n, row in enumerate(found.rows) for token in drafts[row]]
        if pairs:
            add_at(counts, *zip(*pairs, strict=True))
    used = counts > 0
    whole = len(found.rows) == len(logits)
    part = logits if whole else logits[found.members]
    scaled = torch.where(part > 0, part / found.repetition, part * found.repetition)
    part = torch.where(used | table.in_prompt[found.table_rows], scaled, part)
    part = part - (found.frequency * counts + found.presence * used)
    if whole:
        logits.copy_(part)
    else:
        logits[found.members] = part


def _penalties(plan: RowPlan, table: PenaltyTable) -> Penalties:
    states = [plan.states[row] for row in plan.penalised]
    columns = np.array(
        [
            [s.params.repetition_penalty, s.params.frequency_penalty, s.params.presence_penalty]
            for s in states
        ],
        np.float32,
    )
    values = to_device(columns, plan.device)
    return Penalties(
        rows=plan.penalised,
        members=to_device(np.array(plan.penalised, np.int64), plan.device),
        table_rows=to_device(np.array(table.rows(states), np.int64), plan.device),
        repetition=values[:, 0:1],
        frequency=values[:, 1:2],
        presence=values[:, 2:3],
    )
