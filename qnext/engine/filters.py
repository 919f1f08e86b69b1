"""Logits to target distributions, on the device: temperature, then a prefix in falling order.

min_p, top_k and top_p each keep a prefix of the tokens in falling order. Nothing here waits for
the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qnext.engine.row_plan import Group

SORTED = 512
"""Most likely tokens looked at first when only top_p or min_p limits them."""


class Filtered(NamedTuple):
    """Weights (r, K) in proportion to probabilities, ids (r, K), and whether K was enough (r,)."""

    weights: Tensor
    ids: Tensor
    enough: Tensor | None = None


def filtered(logits: Tensor, group: Group, *, whole: bool = False) -> Filtered:
    """The distribution of each row over its tokens in falling order.

    Args:
        logits: (r, V) after all changes.
        group: of these rows.
        whole: look at every token; otherwise ``enough`` tells where that would be needed.
    """
    vocab = logits.shape[1]
    if not whole and (group.least < vocab or vocab <= SORTED):
        values, ids = logits.topk(group.most, -1)
        return Filtered(_nucleus(values / group.temperature, group, None), ids)
    # The nucleus nearly always lies in the first few.
    scaled = logits / group.temperature
    total = scaled.logsumexp(-1, keepdim=True)
    if whole:
        values, ids = scaled.sort(dim=-1, descending=True, stable=True)
        return Filtered(_nucleus(values, group, total), ids)
    values, ids = scaled.topk(SORTED, -1)
    reached = (values - total).exp().sum(-1, keepdim=True) >= group.top_p
    reached = ((group.min_p == 0) & reached) | (values[:, -1:] < values[:, :1] + group.min_p.log())
    return Filtered(_nucleus(values, group, total), ids, reached[:, 0])


def _nucleus(values: Tensor, group: Group, total: Tensor | None) -> Tensor:
    """Weights (r, K) of the first K logits in falling order; each filter keeps a prefix.

    ``total`` (r, 1) is the log of the whole that top_p is a share of where min_p is off; None
    means that what is kept is the whole. Filters that nobody uses cost nothing.
    """
    width = values.shape[1]
    if group.least < width:
        place = torch.arange(width, device=values.device)
        values = values.masked_fill(place >= group.limits, -torch.inf)
    if group.uses_min_p:
        values = values.masked_fill(values < values[:, :1] + group.min_p.log(), -torch.inf)
        if total is not None:
            total = torch.where(group.min_p > 0, values.logsumexp(-1, keepdim=True), total)
    weights = torch.softmax(values, -1) if total is None else (values - total).exp()
    if group.uses_top_p:
        before = weights.cumsum(-1) - weights
        # A rounded sum may reach 1 before the last token: 1 must keep all of them.
        weights = weights.masked_fill((before >= group.top_p) & (group.top_p < 1), 0.0)
    return weights


def inverted(weights: Tensor, draws: Tensor) -> Tensor:
    """Index (r,) at which the running sum of ``weights`` (r, K) passes ``draws`` (r,) in [0, 1).

    Exact zeros are never picked: the running sum does not pass anything there. A row that is not
    a distribution gives some index in range.
    """
    running = weights.double().cumsum(-1)
    target = (draws * running[:, -1])[:, None]
    found = torch.searchsorted(running, target, right=True)[:, 0]
    return found.clamp_max(weights.shape[1] - 1)


def argmax(logits: Tensor) -> Tensor:
    """Index (R,) of the largest of each row (R, V) fp32, the first of equals.

    On a CPU NumPy's is vectorised and torch's (2.13) is not: 2.5 against 28 us for 16,384 logits.
    """
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)
