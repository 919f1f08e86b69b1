"""Triton MoE of decoding, in the interpreter, against the formula of spec section 5 in torch."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from torch.nn.functional import silu

from qnext.kernels.experts import triton_grouped, triton_single
from qnext.kernels.linear.reference import dequantise

H = 512


def make(tokens: int, inner: int, experts: int, fp8: bool):
    def matrix(*shape: int):
        w = torch.randn(*shape)
        if not fp8:
            return w * 0.1, None
        blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
        return w.to(torch.float8_e4m3fn), (torch.rand(blocks) + 0.5) * 0.1

    stacked = (*matrix(experts, 2 * inner, H), *matrix(experts, H, inner))
    shared = (*matrix(2 * inner, H), *matrix(H, inner))
    router = torch.randn(experts + 1, H) * 0.05
    return torch.randn(tokens, H), torch.randn(H) * 0.1, router, stacked, shared


def formula(hidden, norm, router, experts, shared, top_k, norm_topk):
    x = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + norm)
    logits = x @ router.T
    weights, ids = logits[:, :-1].softmax(-1).topk(top_k, -1)
    if norm_topk:
        weights = weights / weights.sum(-1, keepdim=True)
    w1, s1, w2, s2 = experts

    def mlp(row, a, sa, b, sb):
        gate, up = (row @ dequantise(a, sa, torch.float32).T).chunk(2, -1)
        return (silu(gate) * up) @ dequantise(b, sb, torch.float32).T

    out = hidden + logits[:, -1:].sigmoid() * mlp(x, *shared)
    for t, chosen in enumerate(ids.tolist()):
        for j, e in enumerate(chosen):
            scales = (None, None) if s1 is None else (s1[e], s2[e])
            row = mlp(x[t : t + 1], w1[e], scales[0], w2[e], scales[1])
            out[t] += weights[t, j] * row[0]
    return out


def relative(out, ref):
    return float((out - ref).norm() / ref.norm())


@pytest.mark.parametrize(("fp8", "norm_topk"), [(True, True), (False, False)])
def test_one_token(fp8, norm_topk):
    torch.manual_seed(0)
    args = make(1, 512 if fp8 else 256, 16, fp8)
    out = torch.full((1, H), float("nan"))
    config = {"BN": 64, "BD": 64, "KE": 2, "BR": 8}
    triton_single.moe(*args, top_k=3, norm_topk_prob=norm_topk, out=out, config=config)
    want = formula(*args, 3, norm_topk)
    assert relative(out - args[0], want - args[0]) < 1e-5


@pytest.mark.parametrize(
    ("tokens", "fp8", "experts", "few"),
    [(2, True, 16, 1), (5, False, 8, 1), (5, True, 8, 0), (20, True, 8, 0)],
)
def test_several_tokens(tokens, fp8, experts, few):
    torch.manual_seed(tokens)
    args = make(tokens, 128, experts, fp8)
    buffers = triton_grouped.workspace(tokens, 3, H, 128, experts, torch.float32, "cpu")
    for buffer in buffers.values():
        buffer.fill_(float("nan") if buffer.is_floating_point() else 10**6)
    out = torch.full((tokens, H), float("nan"))
    config = {"few": few, "FN": 64, "BN": 64, "BD": 64, "S": 1, "SD": 1}
    triton_grouped.moe(*args, top_k=3, buffers=buffers, out=out, config=config)
    want = formula(*args, 3, True)
    assert relative(out - args[0], want - args[0]) < 1e-5


def test_choices_are_sorted_by_expert_and_none_is_lost():
    torch.manual_seed(1)
    tokens = 20
    args = make(tokens, 128, 8, False)
    b = triton_grouped.workspace(tokens, 3, H, 128, 8, torch.float32, "cpu")
    triton_grouped.moe(*args, top_k=3, buffers=b, config={"BN": 64, "BD": 64, "S": 1, "SD": 1})
    want = b["logits"][:, :8].topk(3, -1).indices
    assert torch.equal(b["ids"].view(-1, 3).long(), want)
    tasks = b["tasks"].view(-1, 2).tolist()
    assert [e for e, _ in tasks] == sorted(want.flatten().tolist())
    covered = []
    for start, (expert, rows) in enumerate(tasks):
        assert rows <= triton_grouped.TILE
        covered += range(start, start + rows)
        for place in range(start, start + rows):
            assert expert in want[b["tokens"][place]]
            assert tasks[place][0] == expert
    assert covered == list(range(tokens * 3))
    assert sorted(b["slots"].tolist()) == list(range(tokens * 3))
    assert torch.allclose(b["weights"].sum(), torch.tensor(float(tokens)))


def test_ties_go_to_the_lower_expert():
    hidden, norm, router, experts, shared = make(1, 512, 16, True)
    router[:16] = router[0]
    out = triton_single.moe(
        hidden, norm, router, experts, shared, top_k=2, config={"BN": 64, "BD": 64, "KE": 2}
    )
    w1, s1, w2, s2 = experts
    only = (w1[:2], s1[:2], w2[:2], s2[:2])
    want = formula(hidden, norm, router[[0, 1, 16]], only, shared, 2, True)
    assert relative(out, want) < 1e-5
