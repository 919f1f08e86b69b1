"""Gated attention for many rows: rotation and storing, then whole rows of scores per key head.

Queries of all heads that share a key head are multiplied together, a few positions at a time, and
only with the keys that those positions see. The softmax is fp32; keys, values and weights are
narrowed to the kind of the products.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qnext.kernels.small_batch.loops import _exp, _turn, sigmoid
from qnext.kernels.tiles.product import PANEL, ROWS, compiled, offsets, product
from qnext.kernels.tiles.tile import LANES, narrow

Array = Any

POSITIONS = 12
"""Query positions that go together: their scores stay in the second-level cache."""


@compiled
def place(
    u: Array,
    first: int,
    last: int,
    q_norm: Array,
    k_norm: Array,
    eps: float,
    per_head: int,
    heads: int,
    cos: Array,
    sin: Array,
    places: Array,
    keys: Array,
    values: Array,
) -> None:
    """Norm and rotate q and k in rows ``first`` to ``last`` of u (q with gates, k, v), store k, v.

    ``keys`` and ``values`` are (rows, Hkv, D); ``places`` says which row belongs to each of u.
    """
    kv_heads, dim = keys.shape[1], keys.shape[2]
    k_at = heads * per_head
    v_at = k_at + kv_heads * dim
    for t in range(first, last):
        row, at = u[t], places[t]
        for head in range(heads):
            _turn(row[head * per_head : head * per_head + dim], q_norm, eps, cos[t], sin[t])
        for head in range(kv_heads):
            part = row[k_at + head * dim : k_at + (head + 1) * dim]
            _turn(part, k_norm, eps, cos[t], sin[t])
            keys[at, head] = part
            values[at, head] = row[v_at + head * dim : v_at + (head + 1) * dim]


@compiled
def attend(
    u: Array,
    begin: int,
    count: int,
    first: int,
    last: int,
    places: Array,
    keys: Array,
    values: Array,
    kv: int,
    heads: int,
    per_head: int,
    y: Array,
) -> None:
    """One sequence, one key head: rows ``first`` to ``last`` of its ``count`` new rows -> y.

    Args:
        u: rotated queries (with gates if ``per_head`` is twice D), from row ``begin`` on.
        begin: first row of the sequence in u and y.
        count: its new rows.
        first: first row of the sequence to compute.
        last: one past the last.
        places: rows of ``keys`` and ``values`` (rows, Hkv, D) of all its tokens, past and new.
        keys: fp32.
        values: fp32.
        kv: which key head.
        heads: query heads in all.
        per_head: columns of u per query head.
        y: (T, heads * D), the kind of the products.
    """
    dim, ratio = keys.shape[2], heads // keys.shape[1]
    pair, past = 4 // y.itemsize, len(places) - count
    total = past + last  # nobody sees more
    steps, seen = -(-dim // pair), -(-total // pair)
    key_vectors = -(-total // PANEL) * (PANEL // LANES)
    columns = -(-dim // LANES)
    packed_k = np.zeros(key_vectors * LANES * steps * pair, y.dtype)
    packed_v = np.zeros(columns * LANES * seen * pair, y.dtype)
    _pack_keys(keys, places[:total], kv, pair, packed_k)
    _pack_values(values, places[:total], kv, pair, packed_v)
    most = -(-POSITIONS * ratio // ROWS) * ROWS
    queries = np.zeros((most, steps * pair), y.dtype)
    scores = np.empty((most, key_vectors * LANES), np.float32)
    weights = np.zeros((most, seen * pair), y.dtype)
    sums = np.empty(most, np.float32)
    out = np.empty((most, columns * LANES), np.float32)
    from_q, to_scores = np.empty(most, np.int64), np.empty(most, np.int64)
    from_weights, to_out = np.empty(most, np.int64), np.empty(most, np.int64)
    scale = np.float32(1.0 / math.sqrt(dim))
    for at in range(first, last, POSITIONS):
        positions = min(POSITIONS, last - at)
        rows = positions * ratio
        limit = past + at + positions
        for t in range(positions):
            for r in range(ratio):
                query, line = (
                    u[begin + at + t, (kv * ratio + r) * per_head :],
                    queries[t * ratio + r],
                )
                for i in range(dim):
                    line[i] = narrow(query[i] * scale, y)
        offsets(rows, 0, queries.shape[1], from_q)
        offsets(rows, 0, scores.shape[1], to_scores)
        offsets(rows, 0, weights.shape[1], from_weights)
        offsets(rows, 0, out.shape[1], to_out)
        product(
            queries, from_q, rows, packed_k, steps, steps, key_vectors, -(-limit // LANES), scores,
            to_scores, 0,
        )  # fmt: skip
        depth = -(-limit // pair)
        for row in range(rows):
            sums[row] = _softmax(
                scores[row], past + at + row // ratio + 1, weights[row], depth * pair
            )
        product(
            weights, from_weights, rows, packed_v, depth, seen, columns, columns, out, to_out, 0
        )
        for row in range(rows):
            t, head = begin + at + row // ratio, kv * ratio + row % ratio
            line, target, norm = out[row], y[t, head * dim :], np.float32(1) / sums[row]
            if per_head > dim:
                gate = u[t, head * per_head + dim :]
                for i in range(dim):
                    target[i] = narrow(line[i] * norm * sigmoid(gate[i]), y)
            else:
                for i in range(dim):
                    target[i] = narrow(line[i] * norm, y)


@compiled
def _softmax(scores: Array, count: int, weights: Array, padded: int) -> Any:
    """Weights of the first ``count`` scores, not yet divided by their sum, which is returned."""
    top = scores[0]
    for s in range(1, count):
        top = max(top, scores[s])
    total = np.float32(0)
    for s in range(count):
        scores[s] = _exp(scores[s] - top)
        total += scores[s]
    for s in range(count):
        weights[s] = narrow(scores[s], weights)
    for s in range(count, padded):
        weights[s] = 0
    return total


@compiled
def _pack_keys(keys: Array, places: Array, kv: int, pair: int, out: Array) -> None:
    """Keys as columns, whole panels of them (see ``product.pack``)."""
    dim = keys.shape[2]
    depth = -(-dim // pair) * pair
    for s in range(len(places)):
        key = keys[places[s], kv]
        base = s // PANEL * PANEL * depth + s % PANEL * pair
        for i in range(dim):
            out[base + i // pair * PANEL * pair + i % pair] = narrow(key[i], out)


@compiled
def _pack_values(values: Array, places: Array, kv: int, pair: int, out: Array) -> None:
    """Values as rows (see ``product.pack``)."""
    dim = values.shape[2]
    columns = -(-dim // LANES) * LANES
    depth = -(-len(places) // pair)
    for begin in range(0, columns, PANEL):
        wide = min(PANEL, columns - begin)
        for s in range(len(places)):
            value = values[places[s], kv]
            line = out[begin * depth * pair + s // pair * wide * pair + s % pair :]
            for i in range(min(wide, dim - begin)):
                line[i * pair] = narrow(value[begin + i], out)
