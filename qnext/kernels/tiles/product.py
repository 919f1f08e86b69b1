"""Matrix products in register tiles: packing, and rows times a packed matrix.

A packed matrix is a row of panels of up to ``PANEL`` columns; a panel holds, step by step, all its
columns, in BF16 two neighbouring inner indices beside each other. ``pair`` is 2 for BF16 and 1
for fp32: the inner indices of a step.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from qnext.kernels.small_batch.loops import MATHS
from qnext.kernels.tiles.tile import LANES, has_wide_registers, make_tile, narrow

Array = Any

compiled = numba.njit(cache=True, fastmath=MATHS, nogil=True, error_model="numpy")

ROWS = 6
VECTORS = 4 if has_wide_registers() else 1
PANEL = VECTORS * LANES

_tile4, _tile3, _tile2, _tile1 = (make_tile(ROWS, min(n, VECTORS)) for n in (4, 3, 2, 1))


def vectors_of(columns: int) -> int:
    """Vectors that hold so many columns."""
    return -(-columns // LANES)


def padded(rows: int) -> int:
    """``rows`` up to whole tiles."""
    return -(-rows // ROWS) * ROWS


@compiled
def pack(w: Array, pair: int, out: Array) -> None:
    """Pack w (inner, columns) into flat ``out`` of steps * pair * vectors * LANES numbers."""
    inner, columns = w.shape
    steps = -(-inner // pair)
    vectors = -(-columns // LANES)
    for begin in range(0, vectors * LANES, PANEL):
        wide = min(PANEL, vectors * LANES - begin)
        base = begin * steps * pair
        for k in range(steps * pair):
            line = base + k // pair * wide * pair + k % pair
            for c in range(wide):
                inside = k < inner and begin + c < columns
                value = w[k, begin + c] if inside else np.float32(0)
                out[line + c * pair] = narrow(value, out)


@compiled
def offsets(count: int, first: int, stride: int, out: Array) -> None:
    """Offsets of ``count`` rows from row ``first`` on; the last one fills the last tile."""
    whole = -(-count // ROWS) * ROWS
    for i in range(whole):
        out[i] = (first + min(i, count - 1)) * stride


@compiled
def product(
    a: Array,
    a_at: Array,
    count: int,
    b: Array,
    steps: int,
    depth: int,
    packed: int,
    vectors: int,
    out: Array,
    out_at: Array,
    keep: float,
) -> None:
    """Row i of out = keep * row i of out + row i of a @ b.

    Args:
        a: BF16 bits or fp32; its rows begin at ``a_at`` (numbers from the start).
        a_at: offsets, padded to whole tiles by repeating the last row.
        count: rows.
        b: packed, of the kind of a.
        steps: of the inner axis to sum over.
        depth: steps that b holds.
        packed: vectors of columns that b holds.
        vectors: vectors of columns to compute.
        out: fp32.
        out_at: offsets of its rows, padded as ``a_at``.
        keep: factor on what is in out; 1 adds to it, 0 overwrites it.
    """
    left, right, into = a.ctypes.data, b.ctypes.data, out.ctypes.data
    factor = np.float32(keep)
    froms, tos = a_at.ctypes.data, out_at.ctypes.data
    for j in range(0, vectors, VECTORS):
        panel, wide = min(VECTORS, packed - j) * LANES, min(VECTORS, vectors - j)
        start, end = right + 4 * LANES * j * depth, into + 4 * LANES * j
        for i in range(0, count, ROWS):
            x, y = froms + 8 * i, tos + 8 * i
            if wide == 4:
                _tile4(a, left, x, start, panel, steps, end, y, factor)
            elif wide == 3:
                _tile3(a, left, x, start, panel, steps, end, y, factor)
            elif wide == 2:
                _tile2(a, left, x, start, panel, steps, end, y, factor)
            else:
                _tile1(a, left, x, start, panel, steps, end, y, factor)


BLOCK = 96
"""Rows that are normed and multiplied together: they stay in the second-level cache."""


@compiled
def norm_rows(
    h: Array, first: int, count: int, weight: Array, eps: float, x: Array, exact: Array
) -> None:
    """RMSNorm of rows of h into x (narrowed) and, if it has rows, into ``exact``."""
    width = len(weight)
    for t in range(count):
        row, out = h[first + t], x[t]
        square = np.float32(0)
        for i in range(width):
            square += row[i] * row[i]
        scale = np.float32(1) / np.sqrt(square / np.float32(width) + np.float32(eps))
        for i in range(width):
            out[i] = narrow(row[i] * scale * weight[i], x)
        if len(exact):
            wide = exact[t]
            for i in range(width):
                wide[i] = row[i] * scale * weight[i]


@compiled
def project(
    h: Array,
    first: int,
    last: int,
    norm: Array,
    eps: float,
    b: Array,
    vectors: int,
    out: Array,
) -> None:
    """Rows ``first`` to ``last`` of out = norm(h) @ b."""
    pair = 4 // b.itemsize
    steps = -(-len(norm) // pair)
    x = np.zeros((BLOCK, steps * pair), b.dtype)
    none = np.empty((0, 0), np.float32)
    a_at, out_at = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
    for begin in range(first, last, BLOCK):
        count = min(BLOCK, last - begin)
        norm_rows(h, begin, count, norm, eps, x, none)
        offsets(count, 0, x.shape[1], a_at)
        offsets(count, begin, out.shape[1], out_at)
        product(x, a_at, count, b, steps, steps, vectors, vectors, out, out_at, 0)


@compiled
def add_product(y: Array, first: int, last: int, b: Array, vectors: int, h: Array) -> None:
    """Rows ``first`` to ``last`` of h += y @ b; y has the kind of b and no more columns than b."""
    steps = y.shape[1] * b.itemsize // 4
    y_at, h_at = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
    for begin in range(first, last, BLOCK):
        count = min(BLOCK, last - begin)
        offsets(count, begin, y.shape[1], y_at)
        offsets(count, begin, h.shape[1], h_at)
        product(y, y_at, count, b, steps, steps, vectors, vectors, h, h_at, 1)
