"""The strict loops (numba): products, norms, convolution, delta rule, attention, experts.

IEEE arithmetic leaves each operation one result, and without fast-math flags the compiler keeps
every operation and its order; it may only do the same operations of several columns at once.
Sums run over channels and keys in rising order, which a row's own position decides.
Rows are tokens. Matrices are (inner, columns), fp32 or bfloat16 bits (uint16); the rest is fp32.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

Array = Any

_strict = numba.njit(cache=True, fastmath=False, nogil=True, error_model="numpy")

ROWS, COLUMNS = 16, 512  # tile of a product: its results stay in the first-level cache


@intrinsic
def fma(typing_context: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once; fp32 or fp64."""
    del typing_context, y, z

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        return builder.fma(*args)

    return x(x, x, x), emit


@intrinsic
def widen(typing_context: Any, bits: Any) -> Any:
    """The fp32 number of a bfloat16's bits, of 32 bits, or of an fp32 itself."""
    del typing_context

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context
        (value,) = args
        if signature.args[0] == types.uint16:
            value = builder.zext(value, ir.IntType(32))
            value = builder.shl(value, ir.Constant(ir.IntType(32), 16))
        if signature.args[0] != types.float32:
            value = builder.bitcast(value, ir.FloatType())
        return value

    return types.float32(bits), emit


@_strict
def exp(x: Any) -> Any:
    """e^x in fp32 by a polynomial, about 1 ulp; below -87 it is zero.

    x = n ln 2 + r with ln 2 in two parts (Cody and Waite), e^r by its Taylor series.
    """
    clamped = min(max(x, np.float32(-87.5)), np.float32(88))
    n = np.floor(fma(clamped, np.float32(1.44269504), np.float32(0.5)))
    r = fma(n, np.float32(-0.693359375), clamped)
    r = fma(n, np.float32(2.12194440e-4), r)
    p = np.float32(1.9875691500e-4)
    p = fma(p, r, np.float32(1.3981999507e-3))
    p = fma(p, r, np.float32(8.3334519073e-3))
    p = fma(p, r, np.float32(4.1665795894e-2))
    p = fma(p, r, np.float32(1.6666665459e-1))
    p = fma(p, r, np.float32(5.0000001201e-1))
    p = fma(p * r, r, r) + np.float32(1)
    scaled = p * widen(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))
    # Infinities and NaN keep their meaning; the clamp alone would hide them.
    low = np.float32(0) if x < np.float32(-87.3) else scaled
    return low if x < np.float32(88.5) else x * np.float32(3e38)


@_strict
def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x)."""
    return np.float32(1) / (np.float32(1) + exp(-x))


@_strict
def softplus(x: Any) -> Any:
    """log(1 + e^x) in fp64 inside: log1p(u) = 2 artanh(u / (2 + u)) by its series."""
    u = np.float64(exp(-abs(x)))
    z = u / (2.0 + u)
    square, total, power = z * z, 0.0, z
    for k in range(16):
        total += power / (2 * k + 1)
        power *= square
    return np.float32(max(np.float64(x), 0.0) + 2.0 * total)


@_strict
def linear(x: Array, w: Array, out: Array, first: int, last: int) -> None:
    """Columns ``first`` to ``last`` of out = x @ w."""
    tokens, inner = x.shape
    whole = inner - inner % 4
    for c0 in range(first, last, COLUMNS):
        c1 = min(c0 + COLUMNS, last)
        for t0 in range(0, tokens, ROWS):
            t1 = min(t0 + ROWS, tokens)
            pairs = t1 - (t1 - t0) % 2
            for t in range(t0, t1):
                out[t, c0:c1] = 0
            for i in range(0, whole, 4):
                w0, w1, w2, w3 = w[i, c0:c1], w[i + 1, c0:c1], w[i + 2, c0:c1], w[i + 3, c0:c1]
                for t in range(t0, pairs, 2):
                    row, also = out[t, c0:c1], out[t + 1, c0:c1]
                    x0, x1, x2, x3 = x[t, i], x[t, i + 1], x[t, i + 2], x[t, i + 3]
                    y0, y1, y2, y3 = x[t + 1, i], x[t + 1, i + 1], x[t + 1, i + 2], x[t + 1, i + 3]
                    for c in range(len(row)):
                        a, b, d, e = widen(w0[c]), widen(w1[c]), widen(w2[c]), widen(w3[c])
                        row[c] = fma(x3, e, fma(x2, d, fma(x1, b, fma(x0, a, row[c]))))
                        also[c] = fma(y3, e, fma(y2, d, fma(y1, b, fma(y0, a, also[c]))))
                for t in range(pairs, t1):
                    row = out[t, c0:c1]
                    x0, x1, x2, x3 = x[t, i], x[t, i + 1], x[t, i + 2], x[t, i + 3]
                    for c in range(len(row)):
                        a, b, d, e = widen(w0[c]), widen(w1[c]), widen(w2[c]), widen(w3[c])
                        row[c] = fma(x3, e, fma(x2, d, fma(x1, b, fma(x0, a, row[c]))))
            for i in range(whole, inner):
                w0 = w[i, c0:c1]
                for t in range(t0, t1):
                    row, x0 = out[t, c0:c1], x[t, i]
                    for c in range(len(row)):
                        row[c] = fma(x0, widen(w0[c]), row[c])


@_strict
def rms_norm(x: Array, weight: Array, eps: float, out: Array) -> None:
    """RMSNorm of rows; ``weight`` already holds one plus the stored value."""
    width = x.shape[1]
    for t in range(x.shape[0]):
        row, to = x[t], out[t]
        square = np.float32(0)
        for i in range(width):
            square = fma(row[i], row[i], square)
        scale = np.float32(1.0 / math.sqrt(square / width + eps))
        for i in range(width):
            to[i] = row[i] * scale * weight[i]


@_strict
def gated_norm(x: Array, z: Array, weight: Array, eps: float) -> None:
    """x = weight * RMSNorm(x) * silu(z) for heads: x and z are (rows, width)."""
    width = x.shape[1]
    for t in range(x.shape[0]):
        row, gate = x[t], z[t]
        square = np.float32(0)
        for i in range(width):
            square = fma(row[i], row[i], square)
        scale = np.float32(1.0 / math.sqrt(square / width + eps))
        for i in range(width):
            row[i] = weight[i] * (row[i] * scale) * (gate[i] * sigmoid(gate[i]))


@_strict
def conv_silu(qkv: Array, taps: Array, bounds: Array, windows: Array, out: Array) -> None:
    """Causal depthwise convolution and SiLU; ``windows`` (N, K - 1, C) advances.

    ``taps`` is (K, C), oldest first.
    """
    width = taps.shape[0] - 1
    for n in range(len(bounds) - 1):
        begin, end = bounds[n], bounds[n + 1]
        for t in range(begin, end):
            to = out[t]
            for j in range(width + 1):
                back = t - begin - width + j  # row within this stretch, or before it
                old = qkv[begin + back] if back >= 0 else windows[n, width + back]
                tap = taps[j]
                if j == 0:
                    for c in range(len(to)):
                        to[c] = tap[c] * old[c]
                else:
                    for c in range(len(to)):
                        to[c] = fma(tap[c], old[c], to[c])
            for c in range(len(to)):
                to[c] *= sigmoid(to[c])
        count = end - begin
        for j in range(width):  # in rising order nothing is read after it was overwritten
            back = count - width + j
            windows[n, j] = qkv[begin + back] if back >= 0 else windows[n, j + count]


@_strict
def unit_heads(x: Array, begin: int, heads: int, size: int, factor: float) -> None:
    """``heads`` heads of x from column ``begin``: each over its L2 norm, times ``factor``."""
    for t in range(x.shape[0]):
        for head in range(heads):
            at = begin + head * size
            row = x[t, at : at + size]
            square = np.float32(0)
            for i in range(size):
                square = fma(row[i], row[i], square)
            scale = np.float32(factor / math.sqrt(square + 1e-6))
            for i in range(size):
                row[i] *= scale


@_strict
def gates(b: Array, a: Array, rate: Array, dt_bias: Array, beta: Array, g: Array) -> None:
    """Write strength and log decay of every head; ``rate`` is -exp(A_log)."""
    for t in range(b.shape[0]):
        for head in range(b.shape[1]):
            beta[t, head] = sigmoid(b[t, head])
            g[t, head] = rate[head] * softplus(a[t, head] + dt_bias[head])


@_strict
def delta_rule(
    qkv: Array,
    g: Array,
    beta: Array,
    bounds: Array,
    state: Array,
    out: Array,
    key_heads: int,
    first: int,
    last: int,
) -> None:
    """Value heads ``first`` to ``last`` token by token; ``state`` (N, Hv, dk, dv) advances.

    ``qkv`` (T, C) holds the heads of q, then of k, then of v; ``out`` is (T, Hv, dv).
    """
    heads, dk, dv = state.shape[1], state.shape[2], state.shape[3]
    keys, values, ratio = key_heads * dk, 2 * key_heads * dk, heads // key_heads
    ahead = np.empty(dv, np.float32)
    for n in range(len(bounds) - 1):
        for head in range(first, last):
            s, at = state[n, head], head // ratio * dk
            for t in range(bounds[n], bounds[n + 1]):
                qt, kt = qkv[t, at : at + dk], qkv[t, keys + at : keys + at + dk]
                vt, o = qkv[t, values + head * dv : values + head * dv + dv], out[t, head]
                decay, write = exp(g[t, head]), beta[t, head]
                ahead[:] = 0
                for i in range(dk):
                    line, ki = s[i], kt[i]
                    for j in range(dv):
                        ahead[j] = fma(ki, line[j], ahead[j])
                for j in range(dv):
                    ahead[j] = write * fma(-decay, ahead[j], vt[j])
                o[:] = 0
                for i in range(dk):
                    line, ki, qi = s[i], kt[i], qt[i]
                    for j in range(dv):
                        value = fma(ki, ahead[j], decay * line[j])
                        line[j] = value
                        o[j] = fma(qi, value, o[j])


@_strict
def head_norm_rotary(x: Array, weight: Array, eps: float, cos: Array, sin: Array) -> None:
    """RMSNorm of every head of x (T, H, D), then the first channels rotated."""
    size, half = x.shape[2], cos.shape[1]
    for t in range(x.shape[0]):
        c, s = cos[t], sin[t]
        for head in range(x.shape[1]):
            row = x[t, head]
            square = np.float32(0)
            for i in range(size):
                square = fma(row[i], row[i], square)
            scale = np.float32(1.0 / math.sqrt(square / size + eps))
            for i in range(size):
                row[i] = row[i] * scale * weight[i]
            for i in range(half):
                one, two = row[i], row[half + i]
                row[i] = fma(one, c[i], -(two * s[i]))
                row[half + i] = fma(two, c[i], one * s[i])


@_strict
def attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    table: Array,
    place: int,
    shift: int,
    scale: float,
    out: Array,
    first: int,
    last: int,
) -> None:
    """Rows of one sequence: softmax over its cached keys, up to each row's own.

    The keys of a head are laid out by channel first, so that scores are sums along channels for
    many keys at once.

    Args:
        q: (T, H, D), the T rows of the sequence.
        k_cache: (blocks, block_size, Hkv, D).
        v_cache: (blocks, block_size, Hkv, D).
        table: (B,) blocks of the sequence.
        place: cache row of the first of them; the others follow.
        shift: first cache row of a sequence.
        scale: factor on the scores.
        out: (T, H, D).
        first: key head to begin with.
        last: key head to end before.
    """
    tokens, size, ratio, width = q.shape[0], k_cache.shape[1], q.shape[1] // k_cache.shape[2], (
        q.shape[2]
    )  # fmt: skip
    total = place + tokens
    keys = np.empty((width, total), np.float32)
    row = np.empty(total, np.float32)
    for kv in range(first, last):
        for begin in range(0, total, size):
            block = k_cache[table[begin // size]]
            for i in range(width):
                to = keys[i, begin : min(begin + size, total)]
                for at in range(len(to)):
                    to[at] = block[at, kv, i]
        for t in range(tokens):
            stop = place + t + 1
            scores = row[shift:stop]
            for head in range(kv * ratio, (kv + 1) * ratio):
                query, o = q[t, head], out[t, head]
                scores[:] = 0
                for i in range(0, width - width % 4, 4):
                    k0, k1 = keys[i, shift:stop], keys[i + 1, shift:stop]
                    k2, k3 = keys[i + 2, shift:stop], keys[i + 3, shift:stop]
                    q0, q1, q2, q3 = query[i], query[i + 1], query[i + 2], query[i + 3]
                    for at in range(len(scores)):
                        scores[at] = fma(
                            q3,
                            k3[at],
                            fma(q2, k2[at], fma(q1, k1[at], fma(q0, k0[at], scores[at]))),
                        )
                for i in range(width - width % 4, width):
                    k0, q0 = keys[i, shift:stop], query[i]
                    for at in range(len(scores)):
                        scores[at] = fma(q0, k0[at], scores[at])
                top = np.float32(-np.inf)
                for at in range(len(scores)):
                    top = scores[at] if scores[at] > top else top
                # A NaN among them is no maximum; it comes back through its own exponential.
                for at in range(len(scores)):
                    scores[at] = exp(scale * (scores[at] - top))
                mass = _lanes(scores)
                o[:] = 0
                whole = len(scores) - len(scores) % 4
                for at in range(0, whole, 4):
                    a = shift + at
                    v0 = v_cache[table[a // size], a % size, kv]
                    v1 = v_cache[table[(a + 1) // size], (a + 1) % size, kv]
                    v2 = v_cache[table[(a + 2) // size], (a + 2) % size, kv]
                    v3 = v_cache[table[(a + 3) // size], (a + 3) % size, kv]
                    p0, p1, p2, p3 = scores[at], scores[at + 1], scores[at + 2], scores[at + 3]
                    for i in range(width):
                        o[i] = fma(p3, v3[i], fma(p2, v2[i], fma(p1, v1[i], fma(p0, v0[i], o[i]))))
                for at in range(whole, len(scores)):
                    a = shift + at
                    v0, p0 = v_cache[table[a // size], a % size, kv], scores[at]
                    for i in range(width):
                        o[i] = fma(p0, v0[i], o[i])
                for i in range(width):
                    o[i] /= mass


@_strict
def _lanes(x: Array) -> Any:
    """The sum of x in four lanes, by place."""
    a = b = c = d = np.float32(0)
    whole = len(x) - len(x) % 4
    for i in range(0, whole, 4):
        a += x[i]
        b += x[i + 1]
        c += x[i + 2]
        d += x[i + 3]
    for i in range(whole, len(x)):
        a += x[i]
    return (a + c) + (b + d)


@_strict
def gate_heads(x: Array, gate: Array) -> None:
    """x *= sigmoid(gate), both (T, H, D)."""
    for t in range(x.shape[0]):
        for head in range(x.shape[1]):
            row, g = x[t, head], gate[t, head]
            for i in range(len(row)):
                row[i] *= sigmoid(g[i])


@_strict
def swiglu(x: Array, out: Array) -> None:
    """silu of the first half of the columns times the second half."""
    width = out.shape[1]
    for t in range(x.shape[0]):
        row, to = x[t], out[t]
        gate, up = row[:width], row[width:]
        for i in range(width):
            to[i] = gate[i] * sigmoid(gate[i]) * up[i]


@_strict
def route(logits: Array, norm: bool, weights: Array, ids: Array) -> None:
    """Softmax over all experts, the best k (of equals the first), optionally renormalised."""
    num, k = logits.shape[1], ids.shape[1]
    probs = np.empty(num, np.float32)
    for t in range(logits.shape[0]):
        row = logits[t]
        top = row[0]
        for e in range(num):
            top = max(top, row[e]) if row[e] == row[e] else row[e]
        total = np.float32(0)
        for e in range(num):
            probs[e] = exp(row[e] - top)
            total += probs[e]
        mass = np.float32(0)
        for rank in range(k):
            best = 0
            for e in range(1, num):
                if probs[e] > probs[best]:
                    best = e
            ids[t, rank] = best
            weights[t, rank] = probs[best] / total
            mass += weights[t, rank]
            probs[best] = -1
        if norm:
            for rank in range(k):
                weights[t, rank] /= mass


@_strict
def experts(
    x: Array,
    order: Array,
    ends: Array,
    gate_up: Array,
    down: Array,
    y: Array,
    first: int,
    last: int,
) -> None:
    """Experts ``first`` to ``last``: rows of y (T k, H) that chose them.

    Args:
        x: (T, H).
        order: (T k,) places in y, grouped by expert.
        ends: (E,) ends of the groups.
        gate_up: (E, H, 2 I).
        down: (E, I, H).
        y: (T k, H); place p belongs to token ``p // k``.
        first: expert to begin with.
        last: expert to end before.
    """
    k, hidden, inner = len(y) // len(x), x.shape[1], down.shape[1]
    for e in range(first, last):
        begin = ends[e - 1] if e else 0
        count = ends[e] - begin
        if count == 0:
            continue
        rows = np.empty((count, hidden), np.float32)
        for r in range(count):
            rows[r] = x[order[begin + r] // k]
        both, act = np.empty((count, 2 * inner), np.float32), np.empty((count, inner), np.float32)
        linear(rows, gate_up[e], both, 0, 2 * inner)
        swiglu(both, act)
        linear(act, down[e], rows, 0, hidden)
        for r in range(count):
            y[order[begin + r]] = rows[r]


@_strict
def mix(y: Array, weights: Array, out: Array) -> None:
    """out[t] += sum over ranks of weights[t, r] * y[t, r], the best expert first."""
    for t in range(out.shape[0]):
        to = out[t]
        for rank in range(y.shape[1]):
            row, share = y[t, rank], weights[t, rank]
            for i in range(len(to)):
                to[i] = fma(share, row[i], to[i])


@_strict
def add_gated(y: Array, gate: Array, out: Array) -> None:
    """out[t] += sigmoid(gate[t]) * y[t]: the shared expert."""
    for t in range(out.shape[0]):
        row, to, share = y[t], out[t], sigmoid(gate[t, 0])
        for i in range(len(to)):
            to[i] = fma(share, row[i], to[i])
