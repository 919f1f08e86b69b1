"""Experts through torch's grouped matrix product, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qnext.kernels.experts.grouped import experts_grouped
from qnext.kernels.experts.reference import experts, route


def _inputs(tokens: int, num: int, top_k: int, ids: Tensor | None = None) -> list[Tensor]:
    rng = torch.Generator().manual_seed(tokens)
    hidden, width = 32, 16
    x = torch.randn(tokens, hidden, generator=rng)
    gate_up = torch.randn(num, 2 * width, hidden, generator=rng) * hidden**-0.5
    down = torch.randn(num, hidden, width, generator=rng) * width**-0.5
    weights, chosen = route(torch.randn(tokens, num, generator=rng), top_k, True)
    return [x, gate_up, down, chosen if ids is None else ids, weights]


def _error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize(("tokens", "num", "top_k"), [(37, 8, 3), (5, 16, 4), (1, 4, 2)])
def test_values_and_gradients(tokens: int, num: int, top_k: int) -> None:
    x, gate_up, down, ids, weights = _inputs(tokens, num, top_k)
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    narrow = [t.bfloat16().requires_grad_() for t in (x, gate_up, down, weights)]
    wide = [t.detach().double().requires_grad_() for t in narrow]
    outs = []
    for function, (a, b, c, w) in ((experts_grouped, narrow), (experts, wide)):
        y = function(a, b, c, ids, w)
        outs.append((y, *torch.autograd.grad((y * slope.to(y.dtype)).sum(), [a, b, c, w])))
    for got, want in zip(*outs, strict=True):
        assert got.dtype == torch.bfloat16
        assert _error(got, want) < 0.02


def test_all_tokens_to_one_expert() -> None:
    x, gate_up, down, ids, weights = _inputs(9, 4, 1, torch.full((9, 1), 2))
    narrow = [t.bfloat16() for t in (x, gate_up, down, weights)]
    want = experts(*(t.double() for t in narrow[:3]), ids, narrow[3].double())
    assert _error(experts_grouped(*narrow[:3], ids, narrow[3]), want) < 0.01


def test_no_tokens_and_other_dtypes() -> None:
    x, gate_up, down, ids, weights = _inputs(0, 4, 2)
    narrow = [t.bfloat16() for t in (x, gate_up, down)]
    assert experts_grouped(*narrow, ids, weights).shape == (0, 32)
    full = _inputs(6, 4, 2)
    torch.testing.assert_close(experts_grouped(*full), experts(*full))
