"""The heart of Gated DeltaNet for many rows, head by head: convolution, rule, gated norm.

The rule goes through the tokens a few at a time (``CHUNK``). With S the state before them, G_c the
decay up to token c and D(j, c) the decay between two of them (Gated DeltaNet, arXiv 2412.06464):

    d_c = beta_c (v_c - G_c k_c^T S - sum_{j<c} D(j, c) (k_c . k_j) d_j)
    o_c = G_c q_c^T S + sum_{j<=c} D(j, c) (q_c . k_j) d_j
    S  <- G_last S + sum_c D(c, last) k_c d_c^T

so that the state is read twice and written once per chunk, in register tiles. All is fp32, and no
decay is ever divided by another.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qnext.kernels.small_batch.loops import sigmoid
from qnext.kernels.tiles.product import compiled
from qnext.kernels.tiles.tile import LANES, has_wide_registers, make_tile, narrow

Array = Any

CHUNK = 4
_ROWS = 2 * CHUNK
_VECTORS = 2 if has_wide_registers() else 1
_BLOCK = 64
_tile = make_tile(_ROWS, _VECTORS)
_tile_last = make_tile(_ROWS, 1)


@compiled
def heads(
    u: Array,
    taps: Array,
    decay: Array,
    dt_bias: Array,
    out_norm: Array,
    eps: float,
    key_heads: int,
    dk: int,
    dv: int,
    stretches: Array,
    conv_state: Array,
    recurrent_state: Array,
    y: Array,
    first: int,
    last: int,
) -> None:
    """Value heads ``first`` to ``last`` of every stretch: rows of u (q|k|v, z, b, a) -> y.

    ``taps`` is (K, C). A stretch is (first row of its sequence, first row, one past its last row,
    slot, slot for a snapshot of its end or -1). Recurrent states advance; convolution windows are
    only read, since other heads may still need them (``advance_windows``).
    """
    count_heads = len(dt_bias)
    ratio, channels = count_heads // key_heads, taps.shape[1]
    b_at = channels + count_heads * dv
    rows, columns = -(-dk // _ROWS) * _ROWS, -(-dv // LANES) * LANES
    state = np.zeros((rows, columns), np.float32)
    queries = np.zeros((_BLOCK, rows), np.float32)
    keys = np.zeros((_BLOCK, rows), np.float32)
    values = np.zeros((_BLOCK, columns), np.float32)
    out = np.zeros((_BLOCK, columns), np.float32)
    gates = np.empty(_BLOCK, np.float32)
    betas = np.empty(_BLOCK, np.float32)
    work = new_work(rows, columns)
    for n in range(len(stretches)):
        begin, start, end, slot, snapshot = stretches[n]
        window = conv_state[slot]
        for head in range(first, last):
            key_at = head // ratio * dk
            state[:dk, :dv] = recurrent_state[slot, head]
            for t in range(start, end, _BLOCK):
                count = min(_BLOCK, end - t)
                convolve(u, taps, window, begin, t, count, key_at, dk, queries)
                convolve(u, taps, window, begin, t, count, key_heads * dk + key_at, dk, keys)
                convolve(
                    u, taps, window, begin, t, count, 2 * key_heads * dk + head * dv, dv, values
                )
                unit_rows(queries, count, dk, np.float32(1.0 / math.sqrt(dk)))
                unit_rows(keys, count, dk, np.float32(1))
                for i in range(count):
                    step = u[t + i, b_at + count_heads + head] + dt_bias[head]
                    soft = step if step > 20 else np.float32(math.log1p(math.exp(step)))
                    gates[i] = math.exp(decay[head] * soft)
                    betas[i] = sigmoid(u[t + i, b_at + head])
                for i in range(0, count, CHUNK):
                    chunk(
                        state, queries, keys, values, gates, betas, i, min(CHUNK, count - i), out,
                        work,
                    )  # fmt: skip
                for i in range(count):
                    line, z = out[i], u[t + i, channels + head * dv :]
                    target = y[t + i, head * dv :]
                    square = np.float32(0)
                    for j in range(dv):
                        square += line[j] * line[j]
                    scale = np.float32(1) / np.sqrt(square / np.float32(dv) + np.float32(eps))
                    for j in range(dv):
                        normed = line[j] * scale * out_norm[j]
                        target[j] = narrow(normed * z[j] * sigmoid(z[j]), y)
            recurrent_state[slot, head] = state[:dk, :dv]
            if snapshot >= 0:
                recurrent_state[snapshot, head] = state[:dk, :dv]


@compiled
def new_work(rows: int, columns: int) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Scratch of ``chunk``: both row sets, looks, turned keys, differences, decays, offsets."""
    at = np.empty((4, _ROWS), np.int64)
    for i in range(_ROWS):
        at[0, i] = i * rows
        at[1, i] = i * columns
    return (
        np.zeros((_ROWS, rows), np.float32),
        np.empty((_ROWS, columns), np.float32),
        np.zeros((rows, CHUNK), np.float32),
        np.zeros((CHUNK, columns), np.float32),
        np.empty((CHUNK, CHUNK), np.float32),
        at,
    )


@compiled
def chunk(
    state: Array,
    queries: Array,
    keys: Array,
    values: Array,
    gates: Array,
    betas: Array,
    first: int,
    count: int,
    out: Array,
    work: tuple[Array, Array, Array, Array, Array, Array],
) -> None:
    """Rows ``first`` to ``first + count`` of out; the state advances past them."""
    both, looks, turned, change, decays, at = work
    rows, columns = state.shape
    for c in range(count):
        both[c] = keys[first + c]
        both[CHUNK + c] = queries[first + c]
    s = state.ctypes.data
    for j in range(0, columns, _VECTORS * LANES):
        target = looks.ctypes.data + 4 * j
        if columns - j >= _VECTORS * LANES:
            _tile(
                both, both.ctypes.data, at.ctypes.data, s + 4 * j, columns, rows, target,
                at[1].ctypes.data, np.float32(0),
            )  # fmt: skip
        else:
            _tile_last(
                both, both.ctypes.data, at.ctypes.data, s + 4 * j, columns, rows, target,
                at[1].ctypes.data, np.float32(0),
            )  # fmt: skip
    total = np.float32(1)
    for c in range(count):
        gate, beta = gates[first + c], betas[first + c]
        total *= gate
        for j in range(c):
            decays[j, c] = decays[j, c - 1] * gate
        decays[c, c] = np.float32(1)
        d, o, value, k, q = change[c], out[first + c], values[first + c], both[c], both[CHUNK + c]
        look, look_q = looks[c], looks[CHUNK + c]
        for i in range(columns):
            d[i] = value[i] - total * look[i]
            o[i] = total * look_q[i]
        for j in range(c):
            earlier, change_j = both[j], change[j]
            with_k, with_q = np.float32(0), np.float32(0)
            for i in range(rows):
                with_k += k[i] * earlier[i]
                with_q += q[i] * earlier[i]
            with_k *= decays[j, c]
            with_q *= decays[j, c]
            for i in range(columns):
                d[i] -= with_k * change_j[i]
                o[i] += with_q * change_j[i]
        with_q = np.float32(0)
        for i in range(rows):
            with_q += q[i] * k[i]
        for i in range(columns):
            d[i] *= beta
            o[i] += with_q * d[i]
    for c in range(count):
        k, factor = both[c], decays[c, count - 1]
        for i in range(rows):
            turned[i, c] = k[i] * factor
    turned_at, state_at = at[2], at[3]
    for i in range(0, rows, _ROWS):
        for r in range(_ROWS):
            turned_at[r] = (i + r) * CHUNK
            state_at[r] = (i + r) * columns
        for j in range(0, columns, _VECTORS * LANES):
            if columns - j >= _VECTORS * LANES:
                _tile(
                    turned, turned.ctypes.data, turned_at.ctypes.data, change.ctypes.data + 4 * j,
                    columns, count, s + 4 * j, state_at.ctypes.data, total,
                )  # fmt: skip
            else:
                _tile_last(
                    turned, turned.ctypes.data, turned_at.ctypes.data, change.ctypes.data + 4 * j,
                    columns, count, s + 4 * j, state_at.ctypes.data, total,
                )  # fmt: skip


@compiled
def convolve(
    u: Array,
    taps: Array,
    window: Array,
    begin: int,
    first: int,
    count: int,
    column: int,
    width: int,
    out: Array,
) -> None:
    """SiLU of the causal convolution of some columns, rows ``first`` to ``first + count``.

    Rows before ``begin`` are in ``window`` (C, K - 1).
    """
    last = taps.shape[0] - 1
    for t in range(count):
        o, fresh, tap = out[t], u[first + t, column:], taps[last, column:]
        for i in range(width):
            o[i] = tap[i] * fresh[i]
        for back in range(1, last + 1):
            place, tap = first + t - back, taps[last - back, column:]
            if place >= begin:
                old = u[place, column:]
                for i in range(width):
                    o[i] += tap[i] * old[i]
            else:
                for i in range(width):
                    o[i] += tap[i] * window[column + i, last + place - begin]
        for i in range(width):
            o[i] *= sigmoid(o[i])


@compiled
def unit_rows(x: Array, count: int, width: int, scale: float) -> None:
    """Rows divided by their L2 norm (epsilon inside the root), times ``scale``."""
    for t in range(count):
        row, square = x[t], np.float32(0)
        for i in range(width):
            square += row[i] * row[i]
        factor = scale / np.sqrt(square + np.float32(1e-6))
        for i in range(width):
            row[i] *= factor


@compiled
def advance_windows(u: Array, stretches: Array, conv_state: Array) -> None:
    """Put the last inputs of every sequence, and of every snapshot, into its window (C, K - 1)."""
    for n in range(len(stretches)):
        begin, _, end, slot, snapshot = stretches[n]
        if snapshot >= 0:
            _window(u, begin, end, conv_state[slot], conv_state[snapshot])
        if n + 1 == len(stretches) or stretches[n + 1, 0] != begin:  # the sequence's last one
            _window(u, begin, end, conv_state[slot], conv_state[slot])


@compiled
def _window(u: Array, begin: int, end: int, old: Array, new: Array) -> None:
    channels, width = old.shape
    for j in range(width):
        at = end - begin + j - width  # oldest first: a column is read before it is written
        for c in range(channels):
            new[c, j] = u[begin + at, c] if at >= 0 else old[c, width + at]
