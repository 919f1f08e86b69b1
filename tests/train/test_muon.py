"""Muon: which matrices, and what its update is."""

from __future__ import annotations

import torch
from tiny import tiny_model

from qnext.train.muon import MOMENTUM, Muon, orthogonalise, wants_muon


def test_hidden_matrices_and_only_they() -> None:
    model = tiny_model(torch.float32, hidden_size=32, moe_intermediate_size=16,
                       tie_word_embeddings=False)  # fmt: skip
    chosen = {n for n, _ in model.named_parameters() if wants_muon(model, n)}
    layer = "model.layers.0."
    for name in ("linear_attn.in_proj_qkv", "linear_attn.out_proj"):
        assert f"{layer}{name}.weight" in chosen
    assert {f"{layer}mlp.experts.gate_up_proj", "mtp.fc.weight"} <= chosen
    for part in ("embed_tokens", "lm_head", "mlp.gate.", "shared_expert_gate", "conv1d", "norm",
                 "A_log", "in_proj_a", "in_proj_b"):  # fmt: skip
        assert not [n for n in chosen if part in n], part


def test_singular_values_become_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 20, 48), (3, 48, 20), (1, 16, 16)):
        x = torch.randn(shape) * torch.tensor([1e-4, 1.0, 1e3])[: shape[0], None, None]
        y = orthogonalise(x)
        values = torch.linalg.svdvals(y)
        if shape[1] != shape[2]:  # a square one may hold values too small to be brought up
            assert values.min() > 0.5
        assert values.max() < 1.3
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        assert (y * (u @ vh)).sum() / (y.norm() * (u @ vh).norm()) > 0.95


def test_the_step_is_momentum_decay_and_a_sized_update() -> None:
    torch.manual_seed(0)
    start = torch.randn(2, 40, 24)
    master = torch.nn.Parameter(start.clone())
    master.grad = torch.randn_like(start)
    muon = Muon(["experts.gate_up_proj"], [master], weight_decay=0.1)
    assert list(muon.buckets) == [(20, 24, False)]
    grad = master.grad.view(4, 20, 24)
    muon.step(0.01, torch.zeros(()))
    momentum = (1 - MOMENTUM) * grad
    torch.testing.assert_close(muon.momentum["experts.gate_up_proj"].view(4, 20, 24), momentum)
    update = orthogonalise(grad * (1 - MOMENTUM) + MOMENTUM * momentum) * (0.2 * 24**0.5)
    want = start * (1 - 0.01 * 0.1) - 0.01 * update.view_as(start)
    torch.testing.assert_close(master.detach(), want)
    # The size of AdamW's updates: about 0.2 a number.
    assert 0.12 < update.square().mean().sqrt() < 0.28


def test_matrices_of_one_shape_do_not_mix() -> None:
    torch.manual_seed(0)
    pair = [torch.nn.Parameter(torch.randn(20, 24)) for _ in range(2)]
    alone = torch.nn.Parameter(pair[1].detach().clone())
    for p in pair:
        p.grad = torch.randn_like(p)
    alone.grad = pair[1].grad.clone()  # type: ignore[union-attr]
    Muon(["a", "b"], pair, 0.0).step(0.1, torch.zeros(()))
    Muon(["b"], [alone], 0.0).step(0.1, torch.zeros(()))
    torch.testing.assert_close(pair[1], alone)
