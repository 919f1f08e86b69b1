"""Logits to tokens: every row with its own parameters, penalties and random numbers.

A row's draw uses one uniform number of its own sequence and the inverse of its cumulative
distribution, so that neither its neighbours nor speculation (speculative.py) change its samples.
Order of operations is vLLM's: masks, bad words, min_tokens, bias, penalties, temperature, min_p,
top_k, top_p. Log-probabilities are of the raw logits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.engine.sampling_params import SamplingParams

_DRAW_BITS = 48
"""Draws are multiples of 2^-48 below 1, so draw * total < total in float64."""

_NEVER = -1e30
"""Logit of ids without a token: probability exactly 0."""

_SORTED = 512
"""Most likely tokens looked at first when only top_p or min_p limits them."""


class Row(NamedTuple):
    """One row of logits: whose it is and which drafts stand between its output and this row."""

    state: SamplingState
    drafts: Sequence[int] = ()


class RawLogprobs(NamedTuple):
    """Numbers behind vLLM's dict of one step: ids, log-probabilities (nats), 1-based ranks."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


@dataclass(slots=True)
class Sampled:
    """Per row: the token, whether it is valid, and its logprobs if asked for.

    A token is not valid when a logit is not finite or when no token is allowed.
    """

    tokens: list[int]
    valid: list[bool]
    logprobs: list[RawLogprobs | None]


class SamplingState:
    """What sampling remembers of one sequence.

    Args:
        params: the request's parameters.
        prompt_ids: the prompt, for the repetition penalty.
        stop_ids: ids that would end this sequence, masked until ``min_tokens``.
        vocab_size: V, ids that may be sampled; rows above are padding.
        seed: of this sequence alone.
        bad_words: token sequences never completed.
        device: where the logits are.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_ids: Sequence[int] = (),
        stop_ids: Sequence[int] = (),
        vocab_size: int,
        seed: int = 0,
        bad_words: Sequence[Sequence[int]] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.params = params
        self.output_ids: list[int] = []
        self.bad_words = [tuple(word) for word in bad_words]
        self._random = random.Random(seed & (2**64 - 1))
        self._ahead: list[float] = []
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
        self.bias = _static_bias(params, vocab_size, device)
        self.prompt_seen: Tensor | None = None
        self.counts: Tensor | None = None
        if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
            self.prompt_seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.prompt_seen[torch.tensor(list(prompt_ids), dtype=torch.long, device=device)] = True
            self.counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        self.changes_logits = bool(
            self.bias is not None
            or self.counts is not None
            or self.bad_words
            or (params.min_tokens and len(stop_ids))
        )
        self.plain_greedy = params.greedy and not self.changes_logits and params.logprobs is None

    def append(self, token: int) -> None:
        """Record an emitted token and use up its random number."""
        self.output_ids.append(token)
        if self.counts is not None:
            self.counts[token] += 1
        if self._ahead:
            del self._ahead[0]

    def draw(self, ahead: int) -> float:
        """The uniform number in [0, 1) of the token ``ahead`` places after the output."""
        while len(self._ahead) <= ahead:
            self._ahead.append(self._random.getrandbits(_DRAW_BITS) / 2**_DRAW_BITS)
        return self._ahead[ahead]


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


def probs(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """The exact distribution (R, V) fp32 that each row is sampled from, after all processing."""
    logits = process_logits(logits.float(), rows)
    result = torch.zeros_like(logits)
    for members, kind in _groups(rows):
        index = torch.tensor(members, device=logits.device)
        part = logits[index]
        params = [rows[i].state.params for i in members]
        if kind == "greedy":
            result[index, argmax(part)] = 1
        elif kind == "plain":
            result[index] = torch.softmax(part / _values("temperature", params, part), -1)
        else:
            for some, weights, ids in _filtered(part, params):
                weights = weights / weights.sum(-1, keepdim=True)
                result[index[some]] = torch.zeros_like(part[some]).scatter_(1, ids, weights)
    return result


class Sampler:
    """Samples every row of a batch.

    Args:
        vocab_size: V, ids that may be sampled: columns from V on are padding and are cut off.
        unused_ids: ids below V that no token has.
    """

    def __init__(self, vocab_size: int, unused_ids: Sequence[int] = ()) -> None:
        self.vocab_size = vocab_size
        self._unused: Tensor | None = None
        if unused_ids:
            self._unused = torch.tensor(unused_ids, dtype=torch.long)

    def __call__(self, logits: Tensor, rows: Sequence[Row]) -> Sampled:
        """Tokens for ``logits`` (R, >= V) of any dtype; ``rows`` has R entries."""
        logits = logits[:, : self.vocab_size].float()
        if self._unused is not None:  # finite, so that a sum still tells damaged rows
            self._unused = self._unused.to(logits.device)
            logits = logits.index_fill(1, self._unused, _NEVER)
        if all(row.state.plain_greedy for row in rows):
            return self._greedy(logits)
        valid = torch.isfinite(logits.sum(-1))
        final = process_logits(logits, rows)
        if final is not logits:  # every token of a row may have been forbidden
            valid &= final.amax(-1) > -torch.inf
        groups = _groups(rows)
        if len(groups) == 1:
            tokens = _pick(final, rows, groups[0][1])
        else:
            tokens = torch.empty(len(rows), dtype=torch.long, device=logits.device)
            for members, kind in groups:
                index = torch.tensor(members, device=logits.device)
                tokens[index] = _pick(final[index], [rows[i] for i in members], kind)
        return Sampled(tokens.tolist(), valid.tolist(), self._logprobs(logits, tokens, rows))

    def _greedy(self, logits: Tensor) -> Sampled:
        """Nothing but the most likely token; the sum is finite only if every logit is."""
        count = logits.shape[0]
        if count == 1:
            valid = math.isfinite(float(logits.sum()))
            return Sampled([int(argmax(logits))], [valid], [None])
        valid_rows = torch.isfinite(logits.sum(-1)).tolist()
        return Sampled(argmax(logits).tolist(), valid_rows, [None] * count)

    @staticmethod
    def _logprobs(raw: Tensor, tokens: Tensor, rows: Sequence[Row]) -> list[RawLogprobs | None]:
        wanted = [row.state.params.logprobs for row in rows]
        members = [i for i, count in enumerate(wanted) if count is not None]
        result: list[RawLogprobs | None] = [None] * len(rows)
        if members:
            counts = [wanted[i] or 0 for i in members]
            for i, found in zip(
                members, top_logprobs(raw[members], tokens[members], counts), strict=True
            ):
                result[i] = found
        return result


def argmax(logits: Tensor) -> Tensor:
    """Index (R,) of the largest of each row (R, V) fp32, the first of equals.

    On a CPU NumPy's is vectorised and torch's (2.13) is not: 2.5 against 28 us for 16,384 logits.
    """
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def top_logprobs(logits: Tensor, chosen: Tensor, counts: Sequence[int]) -> list[RawLogprobs]:
    """Log-probabilities of the chosen tokens and of the most likely ones.

    Args:
        logits: (R, V) raw.
        chosen: (R,) token ids.
        counts: R numbers of most likely tokens, -1 for the whole vocabulary.

    Returns:
        per row the chosen token first, then the most likely ones; a chosen token that is among
        them is not repeated.
    """
    values = torch.log_softmax(logits.float(), -1)
    own = values.gather(1, chosen[:, None])
    ranks = (values > own).sum(-1).add_(1).tolist()
    vocab = logits.shape[1]
    counts = [vocab if count < 0 else min(count, vocab) for count in counts]
    top = values.topk(max(counts), -1)
    columns = (chosen.tolist(), own[:, 0].tolist(), ranks, counts)
    result = []
    for token, value, rank, count, top_values, top_ids in zip(
        *columns, top.values.tolist(), top.indices.tolist(), strict=True
    ):
        ids, logprobs, positions = [token], [value], [rank]
        for place in range(count):
            if top_ids[place] != token:
                ids.append(top_ids[place])
                logprobs.append(top_values[place])
                positions.append(place + 1)
        result.append(RawLogprobs(ids, logprobs, positions))
    return result


def _static_bias(params: SamplingParams, vocab: int, device: torch.device | str) -> Tensor | None:
    """Bias (V,) that never changes: -inf outside ``allowed_token_ids``, plus ``logit_bias``."""
    if params.allowed_token_ids is None and not params.logit_bias:
        return None
    bias = torch.zeros(vocab, dtype=torch.float32)
    if params.allowed_token_ids is not None:
        bias.fill_(-torch.inf)
        bias[list(params.allowed_token_ids)] = 0
    for token, value in (params.logit_bias or {}).items():
        bias[token] += value
    return bias.to(device)


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


def _groups(rows: Sequence[Row]) -> list[tuple[list[int], str]]:
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


def _pick(logits: Tensor, rows: Sequence[Row], kind: str) -> Tensor:
    """Tokens (r,) for processed logits (r, V) of rows of one kind."""
    if kind == "greedy":
        return argmax(logits)
    params = [row.state.params for row in rows]
    draws = torch.tensor([row.state.draw(len(row.drafts)) for row in rows], dtype=torch.float64).to(
        logits.device
    )
    if kind == "plain":
        return _invert(torch.softmax(logits / _values("temperature", params, logits), -1), draws)
    tokens = torch.empty(len(rows), dtype=torch.long, device=logits.device)
    for some, weights, ids in _filtered(logits, params):
        whole = len(some) == len(rows)
        picked = _invert(weights, draws if whole else draws[some])
        found = ids.gather(1, picked[:, None])[:, 0]
        if whole:
            return found
        tokens[some] = found
    return tokens


def _filtered(
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
    temperature = _values("temperature", params, logits)
    if min(limits) < vocab or vocab <= _SORTED:
        values, ids = logits.topk(max(limits), -1)
        yield rows, _nucleus(values / temperature, params, limits, None), ids
        return
    # The nucleus nearly always lies in the first few; only the other rows pay for a sort.
    scaled = logits / temperature
    total = scaled.logsumexp(-1, keepdim=True)
    values, ids = scaled.topk(_SORTED, -1)
    min_p = _values("min_p", params, logits)
    reached = (values - total).exp().sum(-1, keepdim=True) >= _values("top_p", params, logits)
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
        min_p = _values("min_p", params, values)
        values = values.masked_fill(values < values[:, :1] + min_p.log(), -torch.inf)
        if total is not None:
            total = torch.where(min_p > 0, values.logsumexp(-1, keepdim=True), total)
    weights = torch.softmax(values, -1) if total is None else (values - total).exp()
    if any(one.top_p < 1 for one in params):
        before = weights.cumsum(-1) - weights
        top_p = _values("top_p", params, values)
        # A rounded sum may reach 1 before the last token: 1 must keep all of them.
        weights = weights.masked_fill((before >= top_p) & (top_p < 1), 0.0)
    return weights


def _values(name: str, params: Sequence[SamplingParams], like: Tensor) -> Tensor:
    """One parameter as a column (r, 1) fp32 on the device of ``like``."""
    values = [getattr(one, name) for one in params]
    return torch.tensor(values, dtype=torch.float32).to(like.device)[:, None]


def _invert(weights: Tensor, draws: Tensor) -> Tensor:
    """Index (r,) at which the running sum of ``weights`` (r, K) passes ``draws`` (r,) in [0, 1).

    Exact zeros are never picked: the running sum does not pass anything there. A row that is not
    a distribution gives some index in range.
    """
    running = weights.double().cumsum(-1)
    target = (draws * running[:, -1])[:, None]
    found = torch.searchsorted(running, target, right=True)[:, 0]
    return found.clamp_max(weights.shape[1] - 1)
