"""Routing and experts against spec section 5, written out token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qnext.errors import KernelError
from qnext.kernels.experts import experts, route


@pytest.mark.parametrize("renormalise", [True, False])
def test_route(renormalise: bool) -> None:
    logits = torch.randn(20, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights, ids = route(logits, 3, renormalise)
    for row, w, chosen in zip(logits, weights, ids, strict=True):
        best = sorted(range(9), key=lambda e: -row[e])[:3]
        assert chosen.tolist() == best
        p = row.exp() / row.exp().sum()
        expected = p[best] / (p[best].sum() if renormalise else 1)
        torch.testing.assert_close(w, expected, rtol=0, atol=1e-14)


def test_bf16_logits_are_widened_before_the_softmax() -> None:
    logits = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights, _ = route(logits, 4, True)
    expected = logits.float().softmax(-1).topk(4).values
    expected = (expected / expected.sum(-1, keepdim=True)).bfloat16()
    assert torch.equal(weights, expected)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("grad", [False, True])
def test_experts(tokens: int, grad: bool) -> None:
    rng = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    x, gate_up, down = normal(tokens, 6), normal(7, 10, 6), normal(7, 6, 5)
    ids = torch.stack([torch.randperm(7, generator=rng)[:2] for _ in range(tokens)])
    weights = normal(tokens, 2).sigmoid()
    with torch.set_grad_enabled(grad):
        out = experts(x.requires_grad_(grad), gate_up, down, ids, weights).detach()
    for t in range(tokens):
        expected = torch.zeros(6, dtype=torch.float64)
        for w, e in zip(weights[t], ids[t], strict=True):
            inner = F.silu(gate_up[e, :5] @ x[t]) * (gate_up[e, 5:] @ x[t])
            expected += w * (down[e] @ inner)
        torch.testing.assert_close(out[t], expected.detach(), rtol=0, atol=1e-12)


def test_matrices_that_do_not_fit() -> None:
    with pytest.raises(KernelError, match="do not belong together"):
        experts(torch.ones(1, 6), torch.ones(7, 10, 6), torch.ones(7, 6, 4), *torch.zeros(2, 1, 1))
