"""Prefill's mixture of experts in the interpreter against the formula of spec section 5."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.nn.functional import silu

from qnext.kernels.experts import triton_prefill as prefill
from qnext.kernels.linear.quantised import quantise, restore
from qnext.kernels.linear.reference import dequantise
from qnext.kernels.norm.reference import rms_norm

H, F, E, TOP = 256, 128, 6, 3


def matrix(*shape: int):
    blocks = (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
    return torch.randn(*shape).to(torch.float8_e4m3fn), (torch.rand(blocks) + 0.5) * 0.05


def relative(out, want):
    return float((out.double() - want.double()).norm() / want.double().norm())


def draw(tokens: int):
    torch.manual_seed(tokens)
    experts = (*matrix(E, 2 * F, H), *matrix(E, H, F))
    shared = (*matrix(2 * F, H), *matrix(H, F))
    logits = torch.randn(tokens, E + 1)
    logits[:, 1] = -20.0  # an expert that nobody chooses
    return torch.randn(tokens, H), logits, experts, shared


def test_choices_are_sorted_and_every_row_has_one_tile():
    _, logits, _, _ = draw(37)
    got = prefill.route_sorted(logits, TOP, True, 16)
    weights, ids = logits[:, :E].softmax(-1).topk(TOP, -1)
    assert relative(got.weights, weights / weights.sum(-1, keepdim=True)) < 1e-6
    assert relative(got.gate, logits[:, E].sigmoid()) < 1e-6
    assert torch.equal(got.counts.long(), ids.flatten().bincount(minlength=E))
    assert torch.equal(got.slots.flatten().sort().values.long(), torch.arange(37 * TOP))
    covered = []
    for expert, first, rows, _ in got.tiles.tolist():
        if expert < 0:
            continue
        assert 0 < rows <= 16
        covered += range(first, first + rows)
        for row in range(first, first + rows):
            token = int(got.tokens[row])
            if expert == E:
                assert row == 37 * TOP + token
            else:
                rank = ids[token].tolist().index(expert)
                assert int(got.slots[token, rank]) == row
    assert sorted(covered) == list(range(37 * (TOP + 1)))


def test_bf16_logits_choose_the_same_and_ties_go_to_the_lower_expert():
    _, logits, _, _ = draw(40)
    logits = logits.bfloat16()
    logits[:, 4] = logits[:, 2]
    got, want = (prefill.route_sorted(x, TOP, True, 16) for x in (logits, logits.float()))
    assert torch.equal(got.slots.sort(0).values, want.slots.sort(0).values)
    assert torch.equal(got.counts, want.counts)
    assert relative(got.weights, want.weights) < 1e-6
    for token in range(40):
        rows = got.slots[token].tolist()
        experts = [e for e, a, n, _ in got.tiles.tolist() for r in rows if a <= r < a + n]
        assert not (4 in experts and 2 not in experts)


def test_weights_that_are_not_renormalised():
    _, logits, _, _ = draw(5)
    got = prefill.route_sorted(logits, TOP, False, 16)
    assert relative(got.weights, logits[:, :E].softmax(-1).topk(TOP, -1).values) < 1e-6


def test_experts_and_combination():
    tokens = 21
    x, logits, experts, shared = draw(tokens)
    x[3] = 0.0  # groups of zeros have the least scale
    small, scales = quantise(x)
    routing = prefill.route_sorted(logits, TOP, True, 16)
    tile = prefill.Tile(16, 128, 4, 1)
    y = prefill.experts_rows(small, scales, routing, experts, shared, torch.float32, tile, tile)
    assert torch.isfinite(y).all()
    w1, s1, w2, s2 = experts
    exact = restore(small, scales)

    def mlp(rows, a, sa, b, sb):
        gate, up = (rows @ dequantise(a, sa, torch.float32).T).chunk(2, -1)
        inner = restore(*quantise(silu(gate) * up))
        return inner @ dequantise(b, sb, torch.float32).T

    want = torch.empty_like(y)
    for expert, first, rows, _ in routing.tiles.tolist():
        if expert >= 0:
            one = shared if expert == E else (w1[expert], s1[expert], w2[expert], s2[expert])
            at = slice(first, first + rows)
            want[at] = mlp(exact[routing.tokens[at].long()], one[0], one[1], one[2], one[3])
    assert relative(y, want) < 0.08  # the interpreter's FP8 rounding, see test_prefill_norms
    residual, norm = torch.randn(tokens, H), torch.randn(H) * 0.1
    total, normed, *_ = prefill.combine(y, routing, residual, norm, 1e-6)
    parts = y[routing.slots.long()] * routing.weights[:, :, None]
    sum_ = residual + parts.sum(1) + y[tokens * TOP :] * routing.gate[:, None]
    assert relative(total, sum_) < 1e-6
    assert relative(normed, rms_norm(sum_, norm, 1e-6)) < 1e-5
