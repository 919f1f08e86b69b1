"""MoE or MLP half layers for many rows: norm, routing, experts, shared expert, residual sum."""

from __future__ import annotations

from typing import Any

import numpy as np

from qnext.kernels.small_batch.loops import _exp, sigmoid
from qnext.kernels.tiles.product import compiled, norm_rows, offsets, product
from qnext.kernels.tiles.tile import LANES, narrow

Array = Any

BLOCK = 384
"""Rows that are routed together: the more, the more rows an expert's weights serve."""


@compiled
def mlp(
    h: Array,
    first: int,
    last: int,
    norm: Array,
    eps: float,
    router: Array,
    num_experts: int,
    gate_up: Array,
    down: Array,
    inner: int,
    top_k: int,
    normalise: bool,
    shared_gate_up: Array,
    shared_down: Array,
    shared_inner: int,
    shared_scale: Array,
) -> None:
    """Rows ``first`` to ``last``: h += SparseMoe(norm(h)) or MLP(norm(h)), spec section 5.

    Matrices are packed, gate and up as one. A dense MLP is a shared expert without a scale and
    no experts. Routing and the shared scale are fp32 throughout.
    """
    width, wide = len(norm), h.shape[1]
    pair = 4 // shared_gate_up.itemsize
    steps = -(-width // pair)
    x = np.zeros((BLOCK, steps * pair), shared_gate_up.dtype)
    exact = np.empty((BLOCK, width), np.float32)
    logits = np.empty((BLOCK, -(-num_experts // LANES) * LANES), np.float32)
    chosen = np.empty((BLOCK, top_k), np.int64)
    weights = np.empty((BLOCK, top_k), np.float32)
    most = max(inner, shared_inner)
    act_steps = -(-inner // pair)
    shared_steps = -(-shared_inner // pair)
    both = np.empty((BLOCK, -(-2 * most // LANES) * LANES), np.float32)
    act = np.zeros((BLOCK, max(act_steps, shared_steps) * pair), x.dtype)
    from_x, to_both = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
    from_act, to_h = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
    scales = np.empty(BLOCK, np.float32)
    starts = np.empty(num_experts + 1, np.int64)
    order = np.empty(BLOCK * top_k, np.int64)
    h_vectors = wide // LANES
    for begin in range(first, last, BLOCK):
        count = min(BLOCK, last - begin)
        norm_rows(h, begin, count, norm, eps, x, exact)
        if num_experts:
            offsets(count, 0, width, from_x)
            offsets(count, 0, logits.shape[1], to_both)
            product(
                exact, from_x, count, router, width, width, logits.shape[1] // LANES,
                logits.shape[1] // LANES, logits, to_both, 0,
            )  # fmt: skip
            for t in range(count):
                choose(logits[t, :num_experts], normalise, chosen[t], weights[t])
            sort(chosen, count, starts, order)
            for expert in range(num_experts):
                low, high = starts[expert], starts[expert + 1]
                rows = high - low
                if rows == 0:
                    continue
                for i in range(-(-rows // 6) * 6):
                    place = order[low + min(i, rows - 1)]
                    from_x[i] = place // top_k * x.shape[1]
                    to_h[i] = (begin + place // top_k) * wide
                    scales[i] = weights[place // top_k, place % top_k]
                offsets(rows, 0, both.shape[1], to_both)
                offsets(rows, 0, act.shape[1], from_act)
                columns = -(-2 * inner // LANES)
                product(
                    x, from_x, rows, gate_up[expert], steps, steps, columns, columns, both,
                    to_both, 0,
                )  # fmt: skip
                swiglu(both, rows, inner, scales, act)
                product(
                    act, from_act, rows, down[expert], act_steps, act_steps, h_vectors, h_vectors,
                    h, to_h, 1,
                )  # fmt: skip
        if shared_inner:
            for t in range(count):
                scales[t] = np.float32(1)
                if len(shared_scale):
                    total, row = np.float32(0), exact[t]
                    for i in range(width):
                        total += row[i] * shared_scale[i]
                    scales[t] = sigmoid(total)
            offsets(count, 0, x.shape[1], from_x)
            offsets(count, 0, both.shape[1], to_both)
            offsets(count, 0, act.shape[1], from_act)
            offsets(count, begin, wide, to_h)
            columns = -(-2 * shared_inner // LANES)
            product(
                x, from_x, count, shared_gate_up, steps, steps, columns, columns, both, to_both, 0
            )
            swiglu(both, count, shared_inner, scales, act)
            product(
                act, from_act, count, shared_down, shared_steps, shared_steps, h_vectors,
                h_vectors, h, to_h, 1,
            )  # fmt: skip


@compiled
def choose(logits: Array, normalise: bool, chosen: Array, weights: Array) -> None:
    """Softmax of one row of router logits (overwritten) and its best experts."""
    top, total, kept = logits.max(), np.float32(0), np.float32(0)
    for e in range(len(logits)):
        logits[e] = _exp(logits[e] - top)
        total += logits[e]
    for rank in range(len(chosen)):
        best = 0
        for e in range(1, len(logits)):
            if logits[e] > logits[best]:
                best = e
        chosen[rank], weights[rank] = best, logits[best]
        kept += logits[best]
        logits[best] = -1
    for rank in range(len(chosen)):
        weights[rank] /= kept if normalise else total


@compiled
def sort(chosen: Array, count: int, starts: Array, order: Array) -> None:
    """Places (row * k + rank) by expert; those of expert e are order[starts[e] : starts[e + 1]]."""
    experts, top_k = len(starts) - 1, chosen.shape[1]
    starts[:] = 0
    for t in range(count):
        for rank in range(top_k):
            starts[chosen[t, rank] + 1] += 1
    for e in range(experts):
        starts[e + 1] += starts[e]
    for t in range(count):
        for rank in range(top_k):
            e = chosen[t, rank]
            order[starts[e]] = t * top_k + rank
            starts[e] += 1
    for e in range(experts, 0, -1):
        starts[e] = starts[e - 1]
    starts[0] = 0


@compiled
def swiglu(both: Array, count: int, inner: int, scales: Array, act: Array) -> None:
    """act = silu(gate) * up * scale of rows gate|up, narrowed."""
    for t in range(count):
        gate, up, out, scale = both[t], both[t, inner:], act[t], scales[t]
        for i in range(inner):
            out[i] = narrow(gate[i] * sigmoid(gate[i]) * up[i] * scale, act)
