"""The strict loops: right, and each row bitwise the same in any company."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.kernels.attention.reference import attend
from qnext.kernels.causal_conv import reference as conv_reference
from qnext.kernels.experts import reference as experts_reference
from qnext.kernels.gated_delta import reference as delta_reference
from qnext.kernels.strict import loops

SEEDS = st.integers(0, 1 << 20)


def draw(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def half(x: Any) -> Any:
    """bfloat16 bits of x, rounded down."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def test_functions_are_accurate_and_keep_special_values() -> None:
    for x in [*np.linspace(-86, 87, 997), -0.0, 1e-30, -1e-7]:
        exact = math.exp(np.float32(x))
        assert loops.exp(np.float32(x)) == pytest.approx(exact, rel=1.5e-7)
        assert loops.sigmoid(np.float32(x)) == pytest.approx(1 / (1 + 1 / exact), rel=3e-7)
        assert loops.softplus(np.float32(x)) == pytest.approx(math.log1p(exact), rel=3e-7)
    assert loops.exp(np.float32(-np.inf)) == 0
    assert loops.exp(np.float32(-200)) == 0
    assert loops.exp(np.float32(200)) == np.inf
    for function in (loops.exp, loops.sigmoid, loops.softplus):
        assert math.isnan(function(np.float32(np.nan)))


@pytest.mark.parametrize("width", [1, 3, 8, 31, 64])
def test_a_function_gives_the_same_bits_in_any_column(width: int) -> None:
    x, gate = draw(0, 5, 2, width), 20 * draw(1, 5, 2, width)
    together = x.copy()
    loops.gate_heads(together, gate)
    for column in range(width):
        alone, one = x[..., column : column + 1].copy(), gate[..., column : column + 1].copy()
        loops.gate_heads(alone, one)
        assert np.array_equal(alone[..., 0], together[..., column])


@settings(max_examples=40)
@given(SEEDS, st.integers(1, 40), st.integers(1, 70), st.integers(1, 90), st.booleans())
def test_a_row_of_a_product(seed: int, tokens: int, inner: int, columns: int, bits: bool) -> None:
    x, w = draw(seed, tokens, inner), draw(seed + 1, inner, columns)
    if bits:
        w = half(w)
    out, parts = np.full((2, tokens, columns), np.nan, np.float32)
    loops.linear(x, w, out, 0, columns)
    cut = seed % columns
    loops.linear(x, w, parts, 0, cut)
    loops.linear(x, w, parts, cut, columns)
    assert np.array_equal(out, parts)
    for t in range(tokens):
        alone = np.full((1, columns), np.nan, np.float32)
        loops.linear(x[t : t + 1].copy(), w, alone, 0, columns)
        assert np.array_equal(alone[0], out[t])
    exact = (w.astype(np.uint32) << 16).view(np.float32) if bits else w
    np.testing.assert_allclose(out, x.astype(np.float64) @ exact, atol=1e-4)


def test_a_product_adds_up_in_the_order_of_the_channels() -> None:
    """Large numbers that cancel: another order would lose the small one."""
    x = np.array([[1e8, 1.0, -1e8, 1.0, 1.0]], np.float32)
    out = np.empty((1, 3), np.float32)
    loops.linear(x, np.ones((5, 3), np.float32), out, 0, 3)
    assert out.tolist() == [[2.0] * 3]  # ((((1e8 + 1) - 1e8) + 1) + 1), and 1e8 + 1 is 1e8
    tiny = np.float32(1 + 2**-12)
    loops.linear(np.array([[-1, tiny]], np.float32), np.array([[1], [tiny]], np.float32), out, 0, 1)
    assert out[0, 0] == np.float32(2**-11 + 2**-24)  # fused: the product is not rounded


@settings(max_examples=30)
@given(SEEDS, st.integers(1, 30), st.integers(0, 50), st.integers(0, 1))
def test_a_row_of_attention(seed: int, tokens: int, past: int, shift: int) -> None:
    size, heads, kv, width = 4, 6, 2, 10
    total = shift + past + tokens
    rng = np.random.default_rng(seed)
    blocks = -(-total // size)
    q = draw(seed, tokens, heads, width)
    keys, values = draw(seed + 1, 2, blocks * size, kv, width)

    def attention(rows: slice, table: Any) -> Any:
        caches = np.full((2, 40, size, kv, width), np.nan, np.float32)
        for cache, rows_of in zip(caches, (keys, values), strict=True):
            cache[table] = rows_of.reshape(blocks, size, kv, width)
            cache[table[-1], size - (-total % size or -size) :] = np.nan  # past the end: garbage
        part = q[rows].copy()
        out = np.full(part.shape, np.nan, np.float32)
        for head in range(kv):
            loops.attention(part, *caches, table, shift + past + rows.start, shift,
                            np.float32(0.3), out, head, head + 1)  # fmt: skip
        return out

    tables = [rng.permutation(40)[:blocks].astype(np.int32) for _ in range(3)]
    whole = attention(slice(0, tokens), tables[0])
    cut = seed % tokens
    pieces = [attention(slice(0, cut), tables[1])] if cut else []
    pieces.append(attention(slice(cut, tokens), tables[2]))
    assert np.array_equal(np.concatenate(pieces), whole)
    exact = attend(*(torch.from_numpy(x) for x in (q, keys[shift:total], values[shift:total])), 0.3)
    np.testing.assert_allclose(whole, exact, atol=2e-5)


@settings(max_examples=30)
@given(SEEDS, st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_convolution_and_delta_rule_in_pieces(seed: int, lengths: list[int]) -> None:
    tokens, key_heads, heads, dk, dv = sum(lengths), 2, 4, 6, 5
    channels = 2 * key_heads * dk + heads * dv
    qkv, taps = draw(seed, tokens, channels), draw(seed + 1, 4, channels)
    g, beta = -np.abs(draw(seed + 2, tokens, heads)), np.abs(draw(seed + 3, tokens, heads)) / 3

    def run(pieces: list[int]) -> tuple[Any, Any, Any, Any]:
        windows = draw(9, 1, 3, channels)
        state = draw(8, 1, heads, dk, dv)
        mixed = np.empty_like(qkv)
        out = np.empty((tokens, heads, dv), np.float32)
        at = 0
        for n in pieces:
            rows, bounds = slice(at, at + n), np.array([0, n], np.int32)
            loops.conv_silu(qkv[rows], taps, bounds, windows, mixed[rows])
            loops.unit_heads(mixed[rows], 0, key_heads, dk, dk**-0.5)
            loops.unit_heads(mixed[rows], key_heads * dk, key_heads, dk, 1.0)
            for first in range(heads):
                loops.delta_rule(mixed[rows], g[rows], beta[rows], bounds, state, out[rows],
                                 key_heads, first, first + 1)  # fmt: skip
            at += n
        return mixed, out, windows, state

    whole, cut = run([tokens]), run(lengths)
    for one, other in zip(whole, cut, strict=True):
        assert np.array_equal(one, other)
    mixed, out, windows, state = whole
    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    wanted, window = conv_reference.causal_conv(
        torch.from_numpy(qkv), torch.from_numpy(taps.T.copy()), bounds,
        torch.from_numpy(draw(9, 1, 3, channels).transpose(0, 2, 1).copy()),
    )  # fmt: skip
    values = mixed[:, 2 * key_heads * dk :]
    np.testing.assert_allclose(values, wanted[:, 2 * key_heads * dk :], atol=1e-5)
    np.testing.assert_array_equal(windows.transpose(0, 2, 1), window)
    q, k, _ = np.split(mixed, [key_heads * dk, 2 * key_heads * dk], 1)
    arrays = (q.reshape(-1, key_heads, dk), k.reshape(-1, key_heads, dk),
              values.reshape(-1, heads, dv), g, beta)  # fmt: skip
    exact, final = delta_reference.recurrent_gated_delta_rule(
        *(torch.from_numpy(x.copy()) for x in arrays),
        bounds,
        torch.from_numpy(draw(8, 1, heads, dk, dv)),
    )
    np.testing.assert_allclose(out, exact, atol=1e-4)
    np.testing.assert_allclose(state, final, atol=1e-4)


@settings(max_examples=20)
@given(SEEDS, st.integers(1, 12), st.booleans())
def test_experts(seed: int, tokens: int, norm: bool) -> None:
    num, k, hidden, inner = 7, 3, 10, 6
    x, logits = draw(seed, tokens, hidden), draw(seed + 1, tokens, num)
    up, down = draw(seed + 2, num, hidden, 2 * inner), draw(seed + 3, num, inner, hidden)

    def run(rows: slice) -> tuple[Any, Any]:
        part = x[rows].copy()
        weights, ids = np.empty((len(part), k), np.float32), np.empty((len(part), k), np.int64)
        loops.route(logits[rows].copy(), norm, weights, ids)
        flat = ids.ravel()
        order, ends = flat.argsort(kind="stable"), np.bincount(flat, minlength=num).cumsum()
        y = np.full((len(flat), hidden), np.nan, np.float32)
        for e in range(num):
            loops.experts(part, order, ends, up, down, y, e, e + 1)
        out = np.zeros_like(part)
        loops.mix(y.reshape(len(part), k, hidden), weights, out)
        return out, ids

    out, ids = run(slice(0, tokens))
    for t in range(tokens):
        assert np.array_equal(run(slice(t, t + 1))[0][0], out[t])
    weights, wanted = experts_reference.route(torch.from_numpy(logits), k, norm)
    np.testing.assert_array_equal(ids, wanted)
    matrices = (torch.from_numpy(w.transpose(0, 2, 1).copy()) for w in (up, down))
    exact = experts_reference.experts(torch.from_numpy(x), *matrices, wanted, weights)
    np.testing.assert_allclose(out, exact, atol=1e-4)


def test_equal_experts_go_by_their_number() -> None:
    weights, ids = np.empty((1, 3), np.float32), np.empty((1, 3), np.int64)
    loops.route(np.array([[1, 5, 1, 5, 1]], np.float32), True, weights, ids)
    assert ids.tolist() == [[1, 3, 0]]


def test_a_nan_reaches_the_end() -> None:
    q = draw(0, 1, 1, 8)
    keys, values = draw(1, 2, 1, 4, 1, 8)
    keys[0, 1] = np.nan
    out = np.empty_like(q)
    loops.attention(q, keys, values, np.zeros(1, np.int32), 2, 0, np.float32(1), out, 0, 1)
    assert np.isnan(out).all()
