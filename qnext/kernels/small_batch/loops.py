"""Decoding on a CPU in compiled loops (numba): one call per half layer, weights read once.

For a handful of rows the torch references spend most of their time between operations. These
loops do a whole mixer or MLP in one call: norm, projections, the mixer itself, the residual sum.
All arrays are C-contiguous; rows are tokens, ``bounds`` cuts them into sequences. Everything is
fp32 but the matrices, which may be bfloat16 (as uint16): half the bytes, and the same numbers if
the checkpoint was bfloat16.
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

# NaN and infinity keep their meaning (the engine looks for them); only the order of sums is free.
MATHS = {"reassoc", "contract", "arcp", "nsz", "afn"}
_compiled = numba.njit(cache=True, fastmath=MATHS, nogil=True, error_model="numpy")


@intrinsic
def _float(typing_context: Any, bits: Any) -> Any:
    """The fp32 number of 32 bits, or of the 16 bits of a bfloat16, or of an fp32 itself."""
    del typing_context

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context
        (value,) = args
        if signature.args[0] == types.uint16:
            value = builder.shl(
                builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16)
            )
        if signature.args[0] != types.float32:
            value = builder.bitcast(value, ir.FloatType())
        return value

    return types.float32(bits), emit


@_compiled
def _exp(x: float) -> float:
    """e^x by a polynomial that the compiler can vectorise; relative error about 2e-7.

    2^n is built from its bits; the last term lets NaN and infinity through the clamp.
    """
    t = min(max(x * np.float32(1.442695041), np.float32(-126)), np.float32(126))
    n = np.floor(t + np.float32(0.5))
    f = t - n
    p = np.float32(1.535336188e-4)
    p = p * f + np.float32(1.339887440e-3)
    p = p * f + np.float32(9.618437357e-3)
    p = p * f + np.float32(5.550332471e-2)
    p = p * f + np.float32(2.402264791e-1)
    p = p * f + np.float32(6.931472028e-1)
    p = p * f + np.float32(1)
    return p * _float(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23))) + (x - x)


@_compiled
def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    return np.float32(1) / (np.float32(1) + _exp(-x))


@_compiled
def add_linear(x: Array, w: Array, out: Array) -> None:
    """out[t] += x[t] @ w, with w (inner, columns): the transpose of a checkpoint's matrix.

    Four rows of w at a time: w comes from memory once for all t, and sums run along columns, so
    that no vector is ever added up across.
    """
    whole, pairs = w.shape[0] - w.shape[0] % 4, x.shape[0] - x.shape[0] % 2
    for i in range(0, whole, 4):
        w0, w1, w2, w3 = w[i], w[i + 1], w[i + 2], w[i + 3]
        # Slices of rows: the compiler vectorises these, not two-dimensional indices. Two tokens
        # at once share the widening of w.
        for t in range(0, pairs, 2):
            row, x0, x1, x2, x3 = out[t], x[t, i], x[t, i + 1], x[t, i + 2], x[t, i + 3]
            also, y0, y1, y2, y3 = (
                out[t + 1], x[t + 1, i], x[t + 1, i + 1], x[t + 1, i + 2], x[t + 1, i + 3],
            )  # fmt: skip
            for c in range(len(row)):
                a, b, d, e = _float(w0[c]), _float(w1[c]), _float(w2[c]), _float(w3[c])
                row[c] += x0 * a + x1 * b + x2 * d + x3 * e
                also[c] += y0 * a + y1 * b + y2 * d + y3 * e
        for t in range(pairs, x.shape[0]):
            row, x0, x1, x2, x3 = out[t], x[t, i], x[t, i + 1], x[t, i + 2], x[t, i + 3]
            for c in range(len(row)):
                row[c] += (
                    x0 * _float(w0[c])
                    + x1 * _float(w1[c])
                    + x2 * _float(w2[c])
                    + x3 * _float(w3[c])
                )
    for i in range(whole, w.shape[0]):
        w0 = w[i]
        for t in range(x.shape[0]):
            row, x0 = out[t], x[t, i]
            for c in range(len(row)):
                row[c] += x0 * _float(w0[c])


@_compiled
def linear(x: Array, w: Array, out: Array) -> None:
    """out[t] = x[t] @ w."""
    out[:] = 0
    add_linear(x, w, out)


@_compiled
def rms_norm(x: Array, weight: Array, eps: float, out: Array) -> None:
    """RMSNorm of rows; ``weight`` already holds one plus the stored value."""
    width = x.shape[1]
    for t in range(x.shape[0]):
        square = np.float32(0)
        for i in range(width):
            square += x[t, i] * x[t, i]
        scale = np.float32(1.0 / math.sqrt(square / width + eps))
        for i in range(width):
            out[t, i] = x[t, i] * scale * weight[i]


@_compiled
def delta_net(
    h: Array,
    norm: Array,
    in_proj: Array,
    conv: Array,
    decay: Array,
    dt_bias: Array,
    out_norm: Array,
    out_proj: Array,
    eps: float,
    key_heads: int,
    dk: int,
    dv: int,
    bounds: Array,
    slots: Array,
    conv_state: Array,
    recurrent_state: Array,
    provisional: Array,
    qkv: Array,
    kept_k: Array,
    kept_v: Array,
    kept_g: Array,
    kept_beta: Array,
) -> None:
    """h += GatedDeltaNet(norm(h)), spec section 4.

    ``in_proj`` makes q|k|v, z, b, a in one product; ``conv`` is (K, C), ``decay`` is
    -exp(A_log). The slots of provisional sequences stay as they are; their rows' inputs go to
    ``qkv`` (T, C), ``kept_k`` (T, Hk, dk), ``kept_v`` (T, Hv, dv), ``kept_g`` and ``kept_beta``
    (T, Hv), for ``DeltaState.commit``.
    """
    tokens, taps = h.shape[0], conv.shape[0]
    heads, channels = len(dt_bias), conv.shape[1]
    ratio, z_at = heads // key_heads, channels
    b_at = z_at + heads * dv
    a_at = b_at + heads
    x = np.empty_like(h)
    u = np.empty((tokens, in_proj.shape[1]), np.float32)
    y = np.empty((tokens, heads * dv), np.float32)
    rms_norm(h, norm, eps, x)
    linear(x, in_proj, u)
    scratch = np.empty((heads, dk, dv) if provisional.any() else (0, 0, 0), np.float32)
    mixed = np.empty(channels, np.float32)
    ahead = np.empty(dv, np.float32)
    past = np.empty((taps - 1, channels), np.float32)
    for n in range(len(slots)):
        slot = slots[n]
        past[:] = conv_state[slot].T
        state = recurrent_state[slot]
        waits = provisional[n]
        for t in range(bounds[n], bounds[n + 1]):
            # The first provisional token reads the slot, and writes a copy as the others do.
            after = scratch if waits else state
            fresh, tap = u[t, :channels], conv[taps - 1]
            for c in range(channels):
                mixed[c] = tap[c] * fresh[c]
            for j in range(taps - 1):
                tap, old = conv[j], past[j]
                for c in range(channels):
                    mixed[c] += tap[c] * old[c]
            past[: taps - 2] = past[1:].copy()
            past[taps - 2] = fresh
            for c in range(channels):
                mixed[c] *= sigmoid(mixed[c])
            # L2 norm of every q and k head; q also carries 1 / sqrt(dk).
            for head in range(2 * key_heads):
                square = np.float32(0)
                for i in range(head * dk, head * dk + dk):
                    square += mixed[i] * mixed[i]
                scale = np.float32(1.0 / math.sqrt(square + 1e-6))
                if head < key_heads:
                    scale *= np.float32(1.0 / math.sqrt(dk))
                for i in range(head * dk, head * dk + dk):
                    mixed[i] *= scale
            if waits:
                qkv[t] = fresh
                for head in range(key_heads):
                    at = (key_heads + head) * dk
                    kept_k[t, head] = mixed[at : at + dk]
            for head in range(heads):
                q = mixed[head // ratio * dk :]
                k = mixed[(key_heads + head // ratio) * dk :]
                v = mixed[2 * key_heads * dk + head * dv :]
                s, s_after = state[head], after[head]
                step = u[t, a_at + head] + dt_bias[head]
                soft = step if step > 20 else np.float32(math.log1p(math.exp(step)))
                gate = np.float32(math.exp(decay[head] * soft))
                beta = sigmoid(u[t, b_at + head])
                if waits:
                    kept_v[t, head] = v[:dv]
                    kept_g[t, head] = decay[head] * soft
                    kept_beta[t, head] = beta
                for j in range(dv):
                    ahead[j] = 0
                for i in range(dk):
                    line, ki = s[i], k[i]
                    for j in range(dv):
                        ahead[j] += ki * line[j]
                for j in range(dv):
                    ahead[j] = beta * (v[j] - gate * ahead[j])
                out = y[t, head * dv :]
                for j in range(dv):
                    out[j] = 0
                for i in range(dk):
                    line, line_after, ki, qi = s[i], s_after[i], k[i], q[i]
                    for j in range(dv):
                        value = gate * line[j] + ki * ahead[j]
                        line_after[j] = value
                        out[j] += qi * value
                square = np.float32(0)
                for j in range(dv):
                    square += out[j] * out[j]
                scale = np.float32(1.0 / math.sqrt(square / dv + eps))
                z = u[t, z_at + head * dv :]
                for j in range(dv):
                    out[j] *= scale * out_norm[j] * z[j] * sigmoid(z[j])
            state = after
        if not waits:
            conv_state[slot] = past.T
    add_linear(y, out_proj, h)


@_compiled
def replay(
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    qkv: Array,
    bounds: Array,
    slots: Array,
    provisional: Array,
    conv_state: Array,
    recurrent_state: Array,
    accepted: Array,
) -> None:
    """Advance provisional slots over the first ``accepted[n]`` rows that ``delta_net`` kept."""
    heads, dk, dv = v.shape[1], k.shape[2], v.shape[2]
    ratio, width = heads // k.shape[1], conv_state.shape[2]
    ahead = np.empty(dv, np.float32)
    for n in range(len(slots)):
        begin, count = bounds[n], accepted[n]
        if count == 0 or not provisional[n]:
            continue
        for head in range(heads):
            s = recurrent_state[slots[n], head]
            for t in range(begin, begin + count):
                key, value = k[t, head // ratio], v[t, head]
                gate, strength = np.float32(math.exp(g[t, head])), beta[t, head]
                for j in range(dv):
                    ahead[j] = 0
                for i in range(dk):
                    line, ki = s[i], key[i]
                    for j in range(dv):
                        ahead[j] += ki * line[j]
                for j in range(dv):
                    ahead[j] = strength * (value[j] - gate * ahead[j])
                for i in range(dk):
                    line, ki = s[i], key[i]
                    for j in range(dv):
                        line[j] = gate * line[j] + ki * ahead[j]
        window = conv_state[slots[n]]
        for j in range(width):
            at = count + j - width  # oldest first: a column is read before it is written
            for c in range(window.shape[0]):
                window[c, j] = qkv[begin + at, c] if at >= 0 else window[c, width + at]


@_compiled
def attention(
    h: Array,
    norm: Array,
    in_proj: Array,
    q_norm: Array,
    k_norm: Array,
    o_proj: Array,
    eps: float,
    gated: bool,
    cos: Array,
    sin: Array,
    bounds: Array,
    tables: Array,
    pasts: Array,
    shift: int,
    keys: Array,
    values: Array,
) -> None:
    """h += GatedAttention(norm(h)), spec section 3.

    ``in_proj`` makes q (with gates), k, v; new keys and values go to the blocks of ``tables``
    (N, B). ``keys`` and ``values`` are (blocks, block_size, Hkv, D); ``pasts`` tokens are cached
    already, from row ``shift`` on.
    """
    tokens, size = h.shape[0], keys.shape[1]
    kv_heads, dim = keys.shape[2], keys.shape[3]
    per_head = 2 * dim if gated else dim
    k_at = in_proj.shape[1] - 2 * kv_heads * dim
    v_at = in_proj.shape[1] - kv_heads * dim
    heads = k_at // per_head
    ratio = heads // kv_heads
    x = np.empty_like(h)
    q = np.empty((tokens, in_proj.shape[1]), np.float32)
    y = np.zeros((tokens, heads * dim), np.float32)
    rms_norm(h, norm, eps, x)
    linear(x, in_proj, q)
    scale = np.float32(1.0 / math.sqrt(dim))
    for n in range(len(pasts)):
        table = tables[n]
        for t in range(bounds[n], bounds[n + 1]):
            place = pasts[n] + t - bounds[n]
            block, at = table[(place + shift) // size], (place + shift) % size
            for head in range(heads):
                _turn(q[t, head * per_head : head * per_head + dim], q_norm, eps, cos[t], sin[t])
            for head in range(kv_heads):
                part = q[t, k_at + head * dim : k_at + (head + 1) * dim]
                _turn(part, k_norm, eps, cos[t], sin[t])
                keys[block, at, head] = part
                values[block, at, head] = q[t, v_at + head * dim : v_at + (head + 1) * dim]
            scores = np.empty((ratio, place + 1), np.float32)
            for kv in range(kv_heads):
                # The query heads of one key head together: keys and values are read once.
                for s in range(place + 1):
                    key = keys[table[(s + shift) // size], (s + shift) % size, kv]
                    for r in range(ratio):
                        query = q[t, (kv * ratio + r) * per_head :]
                        total = np.float32(0)
                        for i in range(dim):
                            total += query[i] * key[i]
                        scores[r, s] = total * scale
                for r in range(ratio):
                    line = scores[r]
                    top, total = line.max(), np.float32(0)
                    for s in range(place + 1):
                        line[s] = _exp(line[s] - top)
                        total += line[s]
                    for s in range(place + 1):
                        line[s] /= total
                for s in range(place + 1):
                    value = values[table[(s + shift) // size], (s + shift) % size, kv]
                    for r in range(ratio):
                        out, weight = y[t, (kv * ratio + r) * dim :], scores[r, s]
                        for i in range(dim):
                            out[i] += weight * value[i]
            if gated:
                for head in range(heads):
                    for i in range(dim):
                        y[t, head * dim + i] *= sigmoid(q[t, head * per_head + dim + i])
    add_linear(y, o_proj, h)


@_compiled
def _turn(x: Array, weight: Array, eps: float, cos: Array, sin: Array) -> None:
    """Norm of one head, then rotation of its first channels, in place."""
    dim, half = len(x), len(cos)
    square = np.float32(0)
    for i in range(dim):
        square += x[i] * x[i]
    scale = np.float32(1.0 / math.sqrt(square / dim + eps))
    for i in range(dim):
        x[i] *= scale * weight[i]
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i] = a * cos[i] - b * sin[i]
        x[i + half] = b * cos[i] + a * sin[i]


@_compiled
def moe(
    h: Array,
    norm: Array,
    router: Array,
    gate_up: Array,
    down: Array,
    shared_gate: Array,
    shared_up: Array,
    shared_down: Array,
    shared_scale: Array,
    eps: float,
    top_k: int,
    normalise: bool,
) -> None:
    """h += SparseMoe(norm(h)), spec section 5; empty shared matrices for no shared expert."""
    tokens, experts = h.shape[0], router.shape[1]
    inner = down.shape[1]
    x = np.empty_like(h)
    logits = np.empty((tokens, experts), np.float32)
    rms_norm(h, norm, eps, x)
    linear(x, router, logits)
    both = np.empty((1, 2 * inner), np.float32)
    act = np.empty((1, inner), np.float32)
    for t in range(tokens):
        row = logits[t]
        top = row.max()
        total = np.float32(0)
        for e in range(experts):
            row[e] = _exp(row[e] - top)
            total += row[e]
        chosen = np.empty(top_k, np.int64)
        weights = np.empty(top_k, np.float32)
        kept = np.float32(0)
        for rank in range(top_k):
            best = 0
            for e in range(1, experts):
                if row[e] > row[best]:
                    best = e
            chosen[rank], weights[rank] = best, row[best]
            kept += row[best]
            row[best] = -1
        for rank in range(top_k):
            weight = weights[rank] / (kept if normalise else total)
            expert = chosen[rank]
            linear(x[t : t + 1], gate_up[expert], both)
            gate, up, mixed = both[0], both[0, inner:], act[0]
            for i in range(inner):
                mixed[i] = gate[i] * sigmoid(gate[i]) * up[i] * weight
            add_linear(act, down[expert], h[t : t + 1])
    if len(shared_scale):
        mlp_rows(x, shared_gate, shared_up, shared_down, shared_scale, h)


@_compiled
def mlp_rows(
    x: Array, gate_proj: Array, up_proj: Array, down_proj: Array, scale_proj: Array, h: Array
) -> None:
    """h += sigmoid(x . scale) * SwiGLU(x); an empty ``scale_proj`` stands for one."""
    tokens, inner = x.shape[0], gate_proj.shape[1]
    gate = np.empty((tokens, inner), np.float32)
    up = np.empty((tokens, inner), np.float32)
    linear(x, gate_proj, gate)
    linear(x, up_proj, up)
    for t in range(tokens):
        scale = np.float32(1)
        if len(scale_proj):
            total = np.float32(0)
            for i in range(x.shape[1]):
                total += x[t, i] * _float(scale_proj[i, 0])
            scale = sigmoid(total)
        g, u = gate[t], up[t]
        for i in range(inner):
            g[i] *= sigmoid(g[i]) * u[i] * scale
    add_linear(gate, down_proj, h)


@_compiled
def mlp(
    h: Array, norm: Array, gate_proj: Array, up_proj: Array, down_proj: Array, eps: float
) -> None:
    """h += MLP(norm(h)), a dense layer."""
    x = np.empty_like(h)
    rms_norm(h, norm, eps, x)
    mlp_rows(x, gate_proj, up_proj, down_proj, gate_proj[:0], h)
