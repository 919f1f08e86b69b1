"""The compiled convolution for CPU prefill against the reference."""

from __future__ import annotations

import pytest
import torch

from qnext.kernels import causal_conv
from qnext.kernels.causal_conv import loops, reference


@pytest.mark.parametrize("lengths", [[1], [2, 1, 3, 4, 50], [200]])
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("started", [True, False])
def test_loop_equals_reference(lengths: list[int], taps: int, started: bool) -> None:
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(sum(lengths), 20, generator=rng)
    weight = torch.randn(20, taps, generator=rng)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    start = torch.randn(len(lengths), 20, taps - 1, generator=rng) if started else None
    want = reference.causal_conv(x, weight, bounds, start)
    got = loops.causal_conv(x, weight, bounds, start)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


def test_gradients_take_the_reference() -> None:
    x = torch.randn(5, 8, requires_grad=True)
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    assert causal_conv.causal_conv(x, torch.ones(8, 4), bounds)[0].requires_grad
