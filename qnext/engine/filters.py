"""Logits to target distributions: vLLM's processing, vectorised over rows that differ.

Masks, bad words, min_tokens, bias and penalties change logits; temperature, min_p, top_k and top_p
then choose a prefix of the tokens in falling order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qnext.engine.sampling_params import SamplingParams
from qnext.engine.sampling_state import Row, SamplingState

_SORTED = 512
"""Most likely tokens looked at first when only top_p or min_p limits them."""


def process_logits(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Masks, bias and penalties.

    Args:
        logits: (R, V) fp32, left as they are.
        rows: R rows.

    Returns:
        (R, V): a changed copy, or ``logits`` itself when no row asks for anything.
    """
    touched = [i for i, row in enumerate(rows) if row.state.changes_logits]
    if not touched:
        return logits
    logits = logits.clone()
    for i in touched:
        state, drafts = rows[i]
        row, params = logits[i], rows[i].state.params
        _ban(row, state, drafts)
        if state.bias is not None:
            row += state.bias
        if state.counts is not None and state.prompt_seen is not None:
            counts = state.counts
            if drafts:
                ids = torch.tensor(drafts, device=row.device)
                counts = counts.index_add(0, ids, torch.ones_like(ids, dtype=counts.dtype))
            used = counts > 0
            if (penalty := params.repetition_penalty) != 1:
                scaled = torch.where(row > 0, row / penalty, row * penalty)
                row.copy_(torch.where(used | state.prompt_seen, scaled, row))
            row -= params.frequency_penalty * counts + params.presence_penalty * used
    return logits


def _ban(row: Tensor, state: SamplingState, drafts: Sequence[int]) -> None:
    """-inf for stops before ``min_tokens`` and for the last token of a bad word about to end."""
    if len(state.output_ids) + len(drafts) < state.params.min_tokens:
        row[state.stop_ids] = -torch.inf
    if state.bad_words:
        longest = max(map(len, state.bad_words)) - 1
        recent = (*state.output_ids[max(0, len(state.output_ids) - longest) :], *drafts)
        for *head, last in state.bad_words:
            if not head or recent[-len(head) :] == tuple(head):
                row[last] = -torch.inf


def groups_of(rows: Sequence[Row]) -> list[tuple[list[int], str]]:
    """Row numbers by how they are drawn: one row's filters never cost or change another's."""
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        params = row.state.params
        if params.greedy:
            kind = "greedy"
        elif params.top_k:
            kind = "top_k"
        elif params.top_p < 1 or params.min_p > 0:
            kind = "sorted"
        else:
            kind = "plain"
        groups.setdefault(kind, []).append(i)
    return [(members, kind) for kind, members in groups.items()]


def filtered(
    logits: Tensor, params: Sequence[SamplingParams]
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Distribution after temperature, min_p, top_k and top_p, over the tokens in falling order.

    Args:
        logits: (r, V).
        params: r.

    Yields:
        s of the rows, weights (s, K) in proportion to their probabilities, and token ids (s, K).
    """
    vocab, rows = logits.shape[1], list(range(len(params)))
    limits = [min(one.top_k or vocab, vocab) for one in params]
    temperature = column("temperature", params, logits)
    if min(limits) < vocab or vocab <= _SORTED:
        values, ids = logits.topk(max(limits), -1)
        yield rows, _nucleus(values / temperature, params, limits, None), ids
        return
    # The nucleus nearly always lies in the first few; only the other rows pay for a sort.
    scaled = logits / temperature
    total = scaled.logsumexp(-1, keepdim=True)
    values, ids = scaled.topk(_SORTED, -1)
    min_p = column("min_p", params, logits)
    reached = (values - total).exp().sum(-1, keepdim=True) >= column("top_p", params, logits)
    reached = ((min_p == 0) & reached) | (values[:, -1:] < values[:, :1] + min_p.log())
    enough = reached[:, 0].tolist()
    for kept in (True, False):
        rows = [row for row in range(len(params)) if enough[row] is kept]
        if rows:
            some = [params[row] for row in rows]
            if kept:
                found, order = values[rows], ids[rows]
            else:
                found, order = scaled[rows].sort(dim=-1, descending=True, stable=True)
            yield rows, _nucleus(found, some, [vocab] * len(rows), total[rows]), order


def _nucleus(
    values: Tensor, params: Sequence[SamplingParams], limits: Sequence[int], total: Tensor | None
) -> Tensor:
    """Weights (r, K) of the first K logits in falling order; each filter keeps a prefix.

    ``total`` (r, 1) is the log of the whole that top_p is a share of where min_p is off; None
    means that what is kept is the whole. Filters that nobody uses cost nothing.
    """
    width = values.shape[1]
    if min(limits) < width:
        place = torch.arange(width, device=values.device)
        beyond = place >= torch.tensor(limits).to(values.device)[:, None]
        values = values.masked_fill(beyond, -torch.inf)
    if any(one.min_p for one in params):
        min_p = column("min_p", params, values)
        values = values.masked_fill(values < values[:, :1] + min_p.log(), -torch.inf)
        if total is not None:
            total = torch.where(min_p > 0, values.logsumexp(-1, keepdim=True), total)
    weights = torch.softmax(values, -1) if total is None else (values - total).exp()
    if any(one.top_p < 1 for one in params):
        before = weights.cumsum(-1) - weights
        top_p = column("top_p", params, values)
        # A rounded sum may reach 1 before the last token: 1 must keep all of them.
        weights = weights.masked_fill((before >= top_p) & (top_p < 1), 0.0)
    return weights


def column(name: str, params: Sequence[SamplingParams], like: Tensor) -> Tensor:
    """One parameter as a column (r, 1) fp32 on the device of ``like``."""
    values = [getattr(one, name) for one in params]
    return torch.tensor(values, dtype=torch.float32).to(like.device)[:, None]
