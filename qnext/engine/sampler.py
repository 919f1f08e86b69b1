"""Logits to tokens: every row with its own parameters, penalties, rules and random numbers.

A row's draw uses one uniform number of its own sequence and the inverse of its cumulative
distribution, so that neither its neighbours nor speculation (speculative.py) change its samples.
All work is queued on the device of the logits and nothing waits for it until `Draws.host`: one
transfer. docs/generation.md has the order of operations. Log-probabilities are of the raw logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qnext.engine.filters import argmax, filtered, inverted
from qnext.engine.logit_changes import Drafts, StepChanges, changed
from qnext.engine.logprobs import RawLogprobs, logprob_columns, read_columns, top_logprobs
from qnext.engine.penalties import PenaltyTable
from qnext.engine.row_plan import Group, RowPlan, to_device
from qnext.engine.sampling_state import Row, SamplingState
from qnext.engine.uniform import uniforms

__all__ = [
    "Draws",
    "RawLogprobs",
    "Sampled",
    "Sampler",
    "argmax",
    "greedy_drafts",
    "probs",
    "process_logits",
    "top_logprobs",
]

_NEVER = -1e30
"""Logit of ids without a token: probability exactly 0."""


@dataclass(slots=True)
class Sampled:
    """Per row: the token, whether it is valid, its logprobs if asked for, and finite logits.

    A token is not valid when a logit is not finite or when no token is allowed.
    """

    tokens: list[int]
    valid: list[bool]
    logprobs: list[RawLogprobs | None]
    finite: list[bool]


@dataclass(slots=True)
class Draws:
    """Sampled rows that are still on the device.

    Attributes:
        tokens: (R,) int64. Final if ``retries`` is empty.
        finite: (R,) bool, whether every logit was.
        valid: (R,) bool, whether that and some token was allowed.
        raw: (R, V) logits before any change.
        retries: rows for which the likeliest tokens may not have been enough.
    """

    plan: RowPlan
    tokens: Tensor
    finite: Tensor
    valid: Tensor
    raw: Tensor
    retries: list[_Retry]

    def settle(self) -> None:
        """Make ``tokens`` final without a transfer, by sorting where it might be needed."""
        for retry in self.retries:
            whole = retry.whole()
            self.tokens[retry.members] = torch.where(
                retry.enough, self.tokens[retry.members], whole
            )
        self.retries = []

    def host(self) -> Sampled:
        """The one transfer; a second one where a flat distribution needed a full sort."""
        wanted, rows = self.plan.logprobs, len(self.plan.states)
        first = [self.tokens, self.finite, self.valid, *(retry.enough for retry in self.retries)]
        columns: Tensor | None = None
        if wanted:
            columns = self._columns()
            first.append(columns.view(torch.int64).flatten())
        found = torch.cat(first).cpu()
        flags: list[int] = found[
            : len(found) - (0 if columns is None else columns.numel())
        ].tolist()
        if not all(flags[3 * rows :]):
            self.settle()
            return self.host()
        logprobs: list[RawLogprobs | None] = [None] * rows
        if columns is not None:
            numbers = found[len(flags) :].view(torch.float64)
            counts = [count for _, count in wanted]
            read = read_columns(numbers.view(columns.shape).tolist(), counts)
            for (row, _), one in zip(wanted, read, strict=True):
                logprobs[row] = one
        finite = list(map(bool, flags[rows : 2 * rows]))
        valid = list(map(bool, flags[2 * rows : 3 * rows]))
        return Sampled(flags[:rows], valid, logprobs, finite)

    def _columns(self) -> Tensor:
        rows, most = self.plan.logprob_rows, max(count for _, count in self.plan.logprobs)
        if len(rows) == len(self.raw):
            return logprob_columns(self.raw, self.tokens, most)
        return logprob_columns(self.raw[rows], self.tokens[rows], most)


@dataclass(slots=True)
class _Retry:
    """Rows whose distribution may go beyond the tokens that were looked at."""

    members: Tensor
    enough: Tensor
    logits: Tensor
    group: Group
    draws: Tensor

    def whole(self) -> Tensor:
        """Their tokens from all tokens, sorted."""
        weights, ids, _ = filtered(self.logits, self.group, whole=True)
        return ids.gather(1, inverted(weights, self.draws)[:, None])[:, 0]


class Sampler:
    """Samples every row of a batch.

    Args:
        vocab_size: V, ids that may be sampled: columns from V on are padding and are cut off.
        unused_ids: ids below V that no token has.
    """

    def __init__(self, vocab_size: int, unused_ids: Sequence[int] = ()) -> None:
        self.vocab_size = vocab_size
        self.penalties: PenaltyTable | None = None
        self._unused: Tensor | None = None
        if unused_ids:
            self._unused = torch.tensor(unused_ids, dtype=torch.long)
        self._plan: RowPlan | None = None

    def __call__(self, logits: Tensor, rows: Sequence[Row]) -> Sampled:
        """Tokens for ``logits`` (R, >= V) of any dtype; ``rows`` has R entries."""
        drafts = [row.drafts for row in rows] if any(row.drafts for row in rows) else None
        return self.sample(logits, [row.state for row in rows], drafts)

    def sample(
        self, logits: Tensor, states: list[SamplingState], drafts: Drafts | None = None
    ) -> Sampled:
        """Tokens on the host.

        Args:
            logits: (R, >= V) of any dtype.
            states: whose each row is.
            drafts: of each row; None where no row has any.
        """
        if not states:
            return Sampled([], [], [], [])
        logits = self._cut(logits)
        plan = self._plan_of(states, logits.device)
        if plan.plain_greedy:
            return _greedy(logits)
        return self._draw(logits, plan, drafts).host()

    def draw(
        self, logits: Tensor, states: list[SamplingState], drafts: Drafts | None = None
    ) -> Draws:
        """`sample` without waiting for the device."""
        logits = self._cut(logits)
        return self._draw(logits, self._plan_of(states, logits.device), drafts)

    def process(self, logits: Tensor, rows: Sequence[Row]) -> tuple[Tensor, StepChanges, RowPlan]:
        """Logits (R, V) after all changes but forced tokens, what the host did, and the plan."""
        logits = self._cut(logits)
        plan = self._plan_of([row.state for row in rows], logits.device)
        drafts = [row.drafts for row in rows]
        step = StepChanges.of(plan, drafts)
        return self._changed(logits, plan, drafts, step), step, plan

    def _cut(self, logits: Tensor) -> Tensor:
        logits = logits[:, : self.vocab_size].float()
        if self._unused is None:
            return logits
        self._unused = self._unused.to(logits.device)
        # finite, so that a sum still tells damaged rows
        return logits.index_fill(1, self._unused, _NEVER)

    def _plan_of(self, states: list[SamplingState], device: torch.device) -> RowPlan:
        plan = self._plan
        if plan is None or plan.states != states or plan.device != device:
            plan = self._plan = RowPlan(states, self.vocab_size, device)
        return plan

    def _changed(
        self, logits: Tensor, plan: RowPlan, drafts: Drafts | None, step: StepChanges
    ) -> Tensor:
        if not plan.changes:
            return logits
        if plan.penalised and self.penalties is None:
            self.penalties = PenaltyTable(self.vocab_size, logits.device)
        return changed(logits, plan, drafts, step, self.penalties)

    def _draw(self, raw: Tensor, plan: RowPlan, drafts: Drafts | None) -> Draws:
        finite = valid = torch.isfinite(raw.sum(-1))
        step = StepChanges.of(plan, drafts) if plan.each_step else StepChanges()
        logits = self._changed(raw, plan, drafts, step)
        if logits is not raw:  # every token of a row may have been forbidden
            allowed = logits.amax(-1) > -torch.inf
        numbers = _numbers(plan, drafts) if plan.draws else None
        retries: list[_Retry] = []
        if len(plan.groups) == 1:
            tokens = _pick(logits, plan.groups[0], numbers, retries)
        else:
            tokens = torch.empty(len(plan.states), dtype=torch.long, device=raw.device)
            for group in plan.groups:
                members = group.members
                draws = None if numbers is None else numbers[members]
                tokens[members] = _pick(logits[members], group, draws, retries)
        if step.forced:
            where = to_device(np.array(step.forced, np.int64), raw.device)
            tokens[where[:, 0]] = where[:, 1]
            if logits is not raw:
                allowed = allowed.index_fill(0, where[:, 0], True)
        if logits is not raw:
            valid = finite & allowed
        return Draws(plan, tokens, finite, valid, raw, retries)


def _greedy(logits: Tensor) -> Sampled:
    """Nothing but the most likely token; the sum is finite only if every logit is."""
    if logits.device.type == "cpu":  # torch's threads would spin on where the model runs next
        sums = torch.from_numpy(logits.numpy().sum(-1))
    else:
        sums = logits.sum(-1)
    both = torch.stack([argmax(logits).double(), sums.double()])
    tokens, totals = both.tolist()  # one transfer; float64 holds ids exactly
    finite = list(map(math.isfinite, totals))
    return Sampled(list(map(int, tokens)), finite, [None] * len(totals), finite)


def _numbers(plan: RowPlan, drafts: Drafts | None) -> Tensor:
    """The uniform number (R,) float64 of each row's token."""
    places = [len(state.output_ids) for state in plan.states]
    if drafts is not None:
        places = [place + len(ahead) for place, ahead in zip(places, drafts, strict=True)]
    return to_device(uniforms(plan.streams, np.array(places, np.int64)), plan.device)


def _pick(logits: Tensor, group: Group, draws: Tensor | None, retries: list[_Retry]) -> Tensor:
    """Tokens (r,) for processed logits (r, V) of the rows of one group."""
    if group.kind == "greedy" or draws is None:
        return argmax(logits)
    if group.kind == "plain":
        return inverted(torch.softmax(logits / group.temperature, -1), draws)
    weights, ids, enough = filtered(logits, group)
    if enough is not None:
        members = group.members
        if members is None:
            members = torch.arange(len(logits), device=logits.device)
        retries.append(_Retry(members, enough, logits, group, draws))
    return ids.gather(1, inverted(weights, draws)[:, None])[:, 0]


def process_logits(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Masks, bias, user functions and penalties.

    Args:
        logits: (R, V) fp32, left as they are.
        rows: R rows.

    Returns:
        (R, V): a changed copy, or ``logits`` itself when no row asks for anything.
    """
    return Sampler(logits.shape[1]).process(logits, rows)[0]


def probs(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """The exact distribution (R, V) fp32 that each row is sampled from, after all processing."""
    final, step, plan = Sampler(logits.shape[1]).process(logits, rows)
    result = torch.zeros_like(final)
    for group in plan.groups:
        members = group.members
        if members is None:
            members = torch.arange(len(rows), device=logits.device)
        part = final[members]
        if group.kind == "greedy":
            result[members, argmax(part)] = 1
        elif group.kind == "plain":
            result[members] = torch.softmax(part / group.temperature, -1)
        else:
            weights, ids, _ = filtered(part, group, whole=group.kind == "sorted")
            weights = weights / weights.sum(-1, keepdim=True)
            result[members] = torch.zeros_like(part).scatter_(1, ids, weights)
    for row, token in step.forced:
        result[row] = 0
        result[row, token] = 1
    return result


def greedy_drafts(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """The likeliest token (R,) of each row (R, V) that its sequence's own rules allow.

    Drafts that a grammar or a thinking budget forbids would never be accepted.
    """
    step = StepChanges()
    for n, (state, drafts) in enumerate(rows):
        if state.constraint is None:
            continue
        rule = state.rule(drafts)
        if rule.forced is not None:
            step.forced.append((n, rule.forced))
        elif rule.allowed is not None:
            step.masked.append((n, rule.allowed))
    plan = RowPlan([], logits.shape[1], logits.device)
    if step.masked:
        logits = changed(logits, plan, None, step, None)
    tokens = argmax(logits)
    for n, token in step.forced:
        tokens[n] = token
    return tokens
