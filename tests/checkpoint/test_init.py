"""First weights: as the paper asks, and the same wherever they are drawn."""

from __future__ import annotations

import torch
from toy import MODEL

from qnext.checkpoint import build_model
from qnext.checkpoint.init import STD, initialise
from qnext.config import ModelConfig

CONFIG = ModelConfig.from_dict({**MODEL, "num_experts": 16, "hidden_size": 64})


def test_no_expert_is_favoured_by_its_router_row() -> None:
    model = build_model(CONFIG)
    routers = [p for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")]
    assert len(routers) == 3
    for rows in routers:
        norms = rows.detach().norm(dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, STD * 8))
        assert rows.detach().mean().abs() < STD / 5


def test_every_parameter_begins_in_its_range() -> None:
    model = build_model(CONFIG)
    mixer = model.model.layers[0].linear_attn
    rate = mixer.A_log.detach().exp()
    assert (rate >= 0.01).all()
    assert (rate <= 16).all()
    step = torch.nn.functional.softplus(mixer.dt_bias.detach())
    assert (step >= 0.99e-3).all()
    assert (step <= 0.101).all()
    assert mixer.conv1d.weight.detach().abs().max() <= 0.5
    assert (mixer.norm.weight == 1).all()
    for name, p in model.named_parameters():
        if "layernorm" in name or name.endswith(("q_norm.weight", "model.norm.weight")):
            assert (p == 0).all(), name
        elif p.ndim > 1 and "conv1d" not in name:
            assert 0.7 * STD < p.detach().std() < 1.3 * STD, name


def test_a_parameter_can_be_drawn_alone() -> None:
    whole = dict(build_model(CONFIG, seed=7).named_parameters())
    empty = build_model(CONFIG, device="meta")
    for name, p in reversed(list(empty.named_parameters())):
        out = torch.empty(p.shape)
        initialise(empty, name, out, 7)
        assert torch.equal(out, whole[name]), name
    other = dict(build_model(CONFIG, seed=8).named_parameters())
    name = "model.embed_tokens.weight"
    assert not torch.equal(whole[name], other[name])


def test_without_a_seed_torch_s_own_decides() -> None:
    torch.manual_seed(3)
    a = build_model(CONFIG, seed=None)
    torch.manual_seed(3)
    b = build_model(CONFIG, seed=None)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
