"""The compiled delta rule for CPU prefill against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qnext.kernels import gated_delta
from qnext.kernels.gated_delta import loops, reference


def inputs(
    lengths: list[int], heads: tuple[int, int] = (2, 6), dk: int = 16, dv: int = 24
) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(5)
    tokens, (hk, hv) = sum(lengths), heads
    q, k = (F.normalize(torch.randn(tokens, hk, dk, generator=rng), dim=2) for _ in range(2))
    v = torch.randn(tokens, hv, dv, generator=rng)
    g = -2 * torch.rand(tokens, hv, generator=rng)
    beta = torch.rand(tokens, hv, generator=rng)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return [q * dk**-0.5, k, v, g, beta, bounds]


@pytest.mark.parametrize("lengths", [[1], [63, 1, 65, 200], [300]])
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("heads", [(1, 1), (2, 6), (3, 3)])
def test_loop_equals_reference(lengths: list[int], started: bool, heads: tuple[int, int]) -> None:
    args = inputs(lengths, heads)
    start = torch.randn(len(lengths), heads[1], 16, 24) if started else None
    kept = None if start is None else start.clone()
    want = reference.chunk_gated_delta_rule(*args, start)
    got = loops.chunk_gated_delta_rule(*args, start)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
    if start is not None:
        assert torch.equal(start, kept)  # the caller's state is not touched


def test_chosen_without_gradients_only(monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs([70])
    calls = []
    original = loops.chunk_gated_delta_rule
    monkeypatch.setattr(loops, "chunk_gated_delta_rule", lambda *a: calls.append(1) or original(*a))
    gated_delta.chunk_gated_delta_rule(*args)
    assert len(calls) == 1
    args[2].requires_grad_()
    assert gated_delta.chunk_gated_delta_rule(*args)[0].requires_grad
    with torch.no_grad():
        gated_delta.chunk_gated_delta_rule(*args)
    assert len(calls) == 2
    gated_delta.chunk_gated_delta_rule(*(x.double() for x in args[:5]), args[5])
    assert len(calls) == 2
