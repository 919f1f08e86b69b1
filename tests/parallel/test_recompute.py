"""Activation checkpointing: the same gradients, less kept in between."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import randomise
from toy import MODEL

from qnext.checkpoint import build_model
from qnext.config import ModelConfig
from qnext.parallel.recompute import Kind, apply_recompute
from qnext.train.config import LossConfig
from qnext.train.data import make_batch
from qnext.train.loss import Objective, Step


def _run(kinds: tuple[Kind, ...]) -> tuple[float, dict[str, torch.Tensor], int]:
    model = build_model(ModelConfig.from_dict(MODEL), torch.float64)
    randomise(model, 3)
    apply_recompute(model, kinds)
    objective = Objective(model.train(), LossConfig(mtp_depth=2, router_z=0.01))
    rng = np.random.default_rng(0)
    batch = make_batch([rng.integers(0, 32, n) for n in (70, 3, 9)], 2)
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        total, *_, counts = objective(batch, Step(batch.valid, 82))
    before = counts.clone()
    total.backward()
    assert torch.equal(counts, before)  # what runs again does not count again
    names = [n for n, _ in model.named_parameters()]
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert list(grads) == names
    return total.item(), grads, sum(kept.values())


@pytest.fixture(scope="module")
def plain() -> tuple[float, dict[str, torch.Tensor], int]:
    return _run(())


@pytest.mark.parametrize(
    "kinds",
    [("layer",), ("delta_net", "attention"), ("mlp",), ("experts", "norm"), ("layer", "experts")],
    ids="+".join,
)
def test_gradients_stay_and_memory_falls(plain, kinds) -> None:  # type: ignore[no-untyped-def]
    loss, grads, kept = _run(kinds)
    assert loss == plain[0]
    for name, grad in plain[1].items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-12, atol=1e-14, msg=name)
    assert kept < (0.5 if "layer" in kinds else 0.95) * plain[2]
