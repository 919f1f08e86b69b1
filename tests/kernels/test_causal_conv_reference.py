"""The short convolution: against the written sum, and over ragged pieces."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.kernels.causal_conv import causal_conv


def by_hand(x: Tensor, weight: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence: y_t = silu(sum_j w_j x_{t-K+1+j}) with ``past`` (C, K-1) before it."""
    taps = weight.shape[1]
    full = torch.cat([past.T, x])
    rows = [sum(weight[:, j] * full[t + j] for j in range(taps)) for t in range(len(x))]
    y = torch.stack(rows) if rows else x.new_empty(0, x.shape[1])
    return F.silu(y), full[len(x) :].T


@pytest.mark.parametrize("lengths", [(1,), (2,), (9,), (1, 2, 3, 8), (0, 4, 0)])
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("start", [False, True])
def test_equals_the_written_sum(lengths: tuple[int, ...], taps: int, start: bool) -> None:
    rng = torch.Generator().manual_seed(taps)
    x = torch.randn(sum(lengths), 5, generator=rng, dtype=torch.float64)
    weight = torch.randn(5, taps, generator=rng, dtype=torch.float64)
    past = torch.randn(len(lengths), 5, taps - 1, generator=rng, dtype=torch.float64)
    bounds = list(accumulate(lengths, initial=0))
    y, final = causal_conv(
        x, weight, torch.tensor(bounds, dtype=torch.int32), past if start else None
    )
    if not start:
        past = torch.zeros_like(past)
    for n in range(len(lengths)):
        part = slice(bounds[n], bounds[n + 1])
        expected, window = by_hand(x[part], weight, past[n])
        torch.testing.assert_close(y[part], expected, rtol=0, atol=1e-13)
        assert torch.equal(final[n], window)


def test_pieces_equal_the_whole() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(11, 3, generator=rng)
    weight = torch.randn(3, 4, generator=rng)
    whole, last = causal_conv(x, weight, torch.tensor([0, 11]))
    state, parts = None, []
    for piece in x.split([1, 2, 3, 5]):
        y, state = causal_conv(piece, weight, torch.tensor([0, len(piece)]), state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts), whole)
    assert torch.equal(state, last)
