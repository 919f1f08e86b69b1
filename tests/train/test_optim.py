"""AdamW on fp32 masters: groups, arithmetic, skipped steps."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn

from qnext.layers.model import CausalLM
from qnext.train.config import OptimizerConfig
from qnext.train.optim import MasterOptimizer, decayed

CONFIG = OptimizerConfig(lr=1e-2, weight_decay=0.1, grad_clip=1e9)


def _model() -> CausalLM:
    return tiny_model(torch.float32).requires_grad_(True)


def _set_grads(module: nn.Module, seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for name, p in module.named_parameters():
        out[name] = torch.randn(p.shape, generator=rng)
        p.grad = out[name].to(p.dtype)
    return out


def test_decay_groups() -> None:
    model = _model()
    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for name, _ in model.named_parameters():
        kinds[decayed(model, name)].add(name.rpartition("layers.")[2])
    assert kinds[False] == {
        f"{i}.linear_attn.{n}" for i in (0, 2)
        for n in ("A_log", "dt_bias", "conv1d.weight", "norm.weight")
    }  # fmt: skip
    assert {"1.self_attn.q_norm.weight", "0.input_layernorm.weight", "model.norm.weight",
            "0.mlp.experts.gate_up_proj", "0.mlp.gate.weight", "model.embed_tokens.weight",
            "mtp.fc.weight", "mtp.norm.weight"} <= kinds[True]  # fmt: skip


def test_plain_norms_of_the_dense_baseline_are_not_decayed() -> None:
    changes = {"model_type": "qwen3", "num_nextn_predict_layers": 0, "layer_types": None,
               "mlp_only_layers": None}  # fmt: skip
    model = tiny_model(torch.float32, **changes)
    plain = {n for n, _ in model.named_parameters() if not decayed(model, n)}
    assert plain == {n for n, _ in model.named_parameters() if "norm" in n}


def test_steps_are_those_of_adamw() -> None:
    ours, theirs = _model(), _model()
    optimizer = MasterOptimizer(ours, CONFIG)
    names = dict(theirs.named_parameters())
    inner = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 * decayed(theirs, n)} for n, p in names.items()],
        lr=1e-2, betas=CONFIG.betas, eps=CONFIG.eps,
    )  # fmt: skip
    for seed in range(3):
        _set_grads(ours, seed)
        _set_grads(theirs, seed)
        norm = optimizer.step(1e-2)
        total = torch.stack([p.grad.norm() for p in theirs.parameters()]).norm()  # type: ignore[union-attr]
        torch.testing.assert_close(norm, total)
        inner.step()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, names[name], rtol=1e-5, atol=1e-6, msg=name)
        assert p.grad is None


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_both_kinds_learn_a_linear_map(kind: str) -> None:
    torch.manual_seed(0)
    model, truth = nn.Linear(24, 32, bias=False), torch.randn(32, 24) * 0.2
    config = CONFIG.model_copy(update={"kind": kind, "weight_decay": 0.0})
    optimizer = MasterOptimizer(model, config)
    assert (optimizer.muon is not None) == (kind == "muon")
    losses = []
    for _ in range(60):
        x = torch.randn(64, 24)
        loss = (model(x) - x @ truth.t()).square().mean()
        loss.backward()
        optimizer.step(3e-2)
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_gradients_are_clipped_to_the_norm() -> None:
    model = nn.Linear(3, 2)
    optimizer = MasterOptimizer(model, CONFIG.model_copy(update={"grad_clip": 0.5}))
    _set_grads(model, 0)
    optimizer.step(0.0)
    first = torch.cat([optimizer.tensors()[f"exp_avg.{n}"].flatten() for n in ("weight", "bias")])
    # After one step the first moment is (1 - beta1) times the clipped gradient.
    torch.testing.assert_close(first.norm() / (1 - CONFIG.betas[0]), torch.tensor(0.5))


def test_masters_keep_what_bfloat16_cannot() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    start = model.weight.detach().clone()
    config = CONFIG.model_copy(update={"weight_decay": 0.0})
    optimizer = MasterOptimizer(model, config, torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
    torch.testing.assert_close(optimizer.masters[0].data, start, rtol=0, atol=0)
    for _ in range(4):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step(1e-5)
    torch.testing.assert_close(optimizer.masters[0].data, start - 4e-5, rtol=0, atol=1e-7)
    assert torch.equal(model.weight.data, optimizer.masters[0].data.bfloat16())


def test_micro_batches_are_added_in_fp32() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = MasterOptimizer(model, CONFIG, torch.bfloat16)
    for value in (256.0, 1.0, 1.0):  # in bfloat16, 256 + 1 is 256
        model.weight.grad = torch.full_like(model.weight, value)
        optimizer.collect()
        assert model.weight.grad is None
    assert float(optimizer.step(0.0)) == 258.0


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_nothing(bad: float, kind: str) -> None:
    model = _model()
    optimizer = MasterOptimizer(model, CONFIG.model_copy(update={"kind": kind}))
    _set_grads(model, 0)
    optimizer.step(1e-2)
    before = {n: t.clone() for n, t in optimizer.tensors().items()}
    _set_grads(model, 1)
    model.model.embed_tokens.weight.grad[0, 0] = bad  # type: ignore[index]
    optimizer.step(1e-2)
    after = optimizer.tensors()
    assert float(after.pop("skipped")) == 1
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name


def test_a_spike_is_skipped_and_a_lasting_rise_let_through() -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizer = MasterOptimizer(model, CONFIG.model_copy(update={"spike_factor": 3.0}))

    def step(size: float) -> None:
        model.weight.grad = torch.full_like(model.weight, size)
        optimizer.step(1e-3)

    for _ in range(3):
        step(1.0)
    assert float(optimizer.skipped) == 0
    step(50.0)
    assert float(optimizer.skipped) == 1
    for _ in range(60):
        step(10.0)
    rising = float(optimizer.skipped)
    assert rising < 30
    step(10.0)
    assert float(optimizer.skipped) == rising


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_goes_out_and_in(kind: str) -> None:
    first, second = _model(), _model()
    config = CONFIG.model_copy(update={"kind": kind})
    one, two = MasterOptimizer(first, config), MasterOptimizer(second, config)
    _set_grads(first, 0)
    one.step(1e-2)
    two.load_tensors({n: t.clone() for n, t in one.tensors().items()})
    for model, optimizer in ((first, one), (second, two)):
        _set_grads(model, 1)
        optimizer.step(1e-2)
    for name, p in first.named_parameters():
        assert torch.equal(p, second.get_parameter(name)), name
