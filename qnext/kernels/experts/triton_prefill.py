"""Mixture of experts for many tokens, FP8: sort by expert on the device, two grouped products.

``_route`` chooses the experts and counts them, ``_tiles`` turns the counts into a table of row
tiles, ``_place`` sorts the choices. ``_gate_up`` gathers its rows inside the product and ends in
SwiGLU and FP8; ``_down`` gives one BF16 row per choice; ``_combine`` adds the rows of a token in
the order of its choices, the residual, and goes on into the next norm. The shared expert is one
more expert whose rows are all tokens. Weights have one scale per 128x128 block, rows one per 128.

The order of rows inside an expert depends on atomics and may differ between runs; a row's numbers
do not depend on its place, so results are the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext.kernels.norm.triton_prefill import FP8, norm_row, store_fp8

#: Choices per program of ``_place``.
PLACED = 1024


@dataclass(frozen=True)
class Tile:
    """Launch choice of a grouped product."""

    rows: int
    columns: int
    warps: int
    stages: int


#: Measured on an H200; see docs/benchmarks.md.
GATE_UP = Tile(128, 256, 8, 3)
DOWN = Tile(128, 128, 8, 3)


@dataclass(frozen=True)
class Routing:
    """Choices of T tokens sorted by expert; rows T*top_k onwards are those of the shared expert.

    Attributes:
        weights: (T, top_k) fp32.
        gate: (T,) fp32, of the shared expert.
        slots: (T, top_k) int32 row of each choice.
        tokens: (T * (top_k + 1),) int32 token of each row.
        tiles: (tiles, 4) int32: expert or -1, first row, rows; one line for each row tile. The
            last number of the first line is the count of lines in use.
        counts: (E,) int32 tokens of each expert.
    """

    weights: Tensor
    gate: Tensor
    slots: Tensor
    tokens: Tensor
    tiles: Tensor
    counts: Tensor


@triton.jit
def _route(
    logits, ids, ranks, weights, gate, counts, T, s_logits,
    E: tl.constexpr, EP: tl.constexpr, TOP: tl.constexpr, TP: tl.constexpr, BT: tl.constexpr,
    NORM_TOPK: tl.constexpr,
):  # fmt: skip
    """Softmax, the TOP best (ties to the lower number), and each choice's place in its expert."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.arange(0, EP)[None, :]
    which = tl.arange(0, TP)[None, :]
    row = t.to(tl.int64)[:, None]
    live = (t < T)[:, None]
    x = tl.load(logits + row * s_logits + e, mask=live & (e < E), other=0.0).to(tl.float32)
    x = tl.where(e < E, x, float("-inf"))
    top = tl.max(x, 1)
    every = tl.sum(tl.exp(x - top[:, None]), 1)
    chosen = tl.zeros([BT, TP], tl.int32)
    weight = tl.zeros([BT, TP], tl.float32)
    if logits.dtype.element_ty == tl.float32:
        for i in tl.static_range(TOP):
            best, index = tl.max(x, 1, return_indices=True)
            chosen = tl.where(which == i, index[:, None], chosen)
            weight = tl.where(which == i, tl.exp(best - top)[:, None], weight)
            x = tl.where(e == index[:, None], float("-inf"), x)
    else:
        # 16 bits of a logit in an order that integers have, and below them the expert: one
        # maximum finds both
        bits = x.to(logits.dtype.element_ty).to(tl.int16, bitcast=True).to(tl.int32)
        bits = tl.where(bits < 0, bits ^ 0x7FFF, bits)
        keys = tl.where(e < E, bits * 65536 + (65535 - e), -2147483648)
        for i in tl.static_range(TOP):
            best_key = tl.max(keys, 1)
            index = 65535 - (best_key & 0xFFFF)
            at_best = best_key >> 16
            at_best = tl.where(at_best < 0, at_best ^ 0x7FFF, at_best).to(tl.int16)
            best = at_best.to(logits.dtype.element_ty, bitcast=True).to(tl.float32)
            chosen = tl.where(which == i, index[:, None], chosen)
            weight = tl.where(which == i, tl.exp(best - top)[:, None], weight)
            keys = tl.where(keys == best_key[:, None], -2147483648, keys)
    total = tl.sum(weight, 1) if NORM_TOPK else every
    used = live & (which < TOP)
    at = row * TOP + which
    tl.store(ids + at, chosen, mask=used)
    tl.store(weights + at, weight / total[:, None], mask=used)
    rank = tl.atomic_add(counts + chosen, tl.zeros([BT, TP], tl.int32) + 1, mask=used)
    tl.store(ranks + at, rank, mask=used)
    last = tl.load(logits + t.to(tl.int64) * s_logits + E, mask=t < T, other=0.0)
    tl.store(gate + t, tl.sigmoid(last.to(tl.float32)), mask=t < T)


@triton.jit
def _tiles(
    counts, starts, tiles, T, MAX,
    E: tl.constexpr, EP: tl.constexpr, TOP: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: first row of each expert, and the row tiles of all, the shared expert last."""
    e = tl.arange(0, EP)
    count = tl.load(counts + e, mask=e < E, other=0)
    start = tl.cumsum(count, 0) - count
    tl.store(starts + e, start, mask=e < E)
    each = tl.cdiv(count, BM)
    first = tl.cumsum(each, 0) - each
    used = tl.sum(each, 0)
    for j in range(tl.max(each, 0)):
        line = tiles + (first + j) * 4
        live = j < each
        tl.store(line, e, mask=live)
        tl.store(line + 1, start + j * BM, mask=live)
        tl.store(line + 2, tl.minimum(count - j * BM, BM), mask=live)
    for b in range(used, MAX, BLOCK):
        i = b + tl.arange(0, BLOCK)
        row = (i - used) * BM
        tl.store(tiles + i * 4, tl.where(row < T, E, -1), mask=i < MAX)
        tl.store(tiles + i * 4 + 1, T * TOP + row, mask=i < MAX)
        tl.store(tiles + i * 4 + 2, tl.minimum(T - row, BM), mask=i < MAX)
    tl.store(tiles + 3, used + tl.cdiv(T, BM))


@triton.jit
def _place(ids, ranks, starts, slots, tokens, T, TOP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < T * TOP
    expert = tl.load(ids + i, mask=live, other=0)
    slot = tl.load(starts + expert, mask=live, other=0) + tl.load(ranks + i, mask=live, other=0)
    tl.store(slots + i, slot, mask=live)
    tl.store(tokens + slot, i // TOP, mask=live)
    tl.store(tokens + T * TOP + i, i, mask=i < T)


@triton.jit
def _gate_up(
    x, x_scales, tokens, tiles, w, w_scale, shared, shared_scale, act, act_scales, T, R,
    E: tl.constexpr, H: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """128 channels of ``silu(gate) * up`` of one row tile, in FP8: one product of 256 columns."""
    tile = tl.program_id(0) // (F // 128)
    n = tl.program_id(0) % (F // 128)
    expert = tl.load(tiles + tile * 4)
    if expert < 0:
        return
    first = tl.load(tiles + tile * 4 + 1)
    count = tl.load(tiles + tile * 4 + 2)
    KB: tl.constexpr = H // 128
    NB: tl.constexpr = F // 128
    # a choice, not a branch: through a branch the alignment of the pointer gets lost
    w = tl.where(expert == E, shared, w + expert.to(tl.int64) * (2 * F * H))
    w_scale = tl.where(expert == E, shared_scale, w_scale + expert * (2 * NB * KB))
    i = tl.arange(0, BM)
    c = tl.arange(0, 128)
    j = tl.arange(0, 256)
    token = tl.load(tokens + first + tl.minimum(i, count - 1))
    a_at = x + token.to(tl.int64)[:, None] * H + c[None, :]
    b_at = w + (n * 128 + j % 128 + j // 128 * F)[:, None] * H + c[None, :]
    w_scale += (n + j // 128 * NB) * KB
    acc = tl.zeros([BM, 256], tl.float32)
    a_scale = tl.load(x_scales + token)
    b_scale = tl.load(w_scale)
    for k in tl.range(0, KB, num_stages=STAGES):
        a = tl.load(a_at + k * 128)
        b = tl.load(b_at + k * 128)
        # scales one step ahead, in registers: pipelined with the tiles they cost 33 copies a thread
        after = tl.minimum(k + 1, KB - 1)
        a_next = tl.load(x_scales + after * T + token)
        b_next = tl.load(w_scale + after)
        acc += tl.dot(a, tl.trans(b)) * a_scale[:, None] * b_scale[None, :]
        a_scale = a_next
        b_scale = b_next
    gate, up = tl.split(tl.permute(tl.reshape(acc, [BM, 2, 128]), [0, 2, 1]))
    out = gate * tl.sigmoid(gate) * up
    row = (first + i).to(tl.int64)[:, None]
    at = row * F + n * 128 + c[None, :]
    store_fp8(out, act, act_scales, at, n, R.to(tl.int64), row, (i < count)[:, None], 128, BM)


@triton.jit
def _down(
    act, act_scales, tiles, w, w_scale, shared, shared_scale, y, R,
    E: tl.constexpr, H: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """BN channels of the rows of one tile; a power of two."""
    tile = tl.program_id(0) // (H // BN)
    n = tl.program_id(0) % (H // BN)
    expert = tl.load(tiles + tile * 4)
    if expert < 0:
        return
    first = tl.load(tiles + tile * 4 + 1)
    count = tl.load(tiles + tile * 4 + 2)
    KB: tl.constexpr = F // 128
    w = tl.where(expert == E, shared, w + expert.to(tl.int64) * (H * F))
    w_scale = tl.where(expert == E, shared_scale, w_scale + expert * (H // 128 * KB))
    i = tl.arange(0, BM)
    c = tl.arange(0, 128)
    column = n * BN + tl.arange(0, BN)
    row = (first + tl.minimum(i, count - 1)).to(tl.int64)
    a_at = act + row[:, None] * F + c[None, :]
    b_at = w + column[:, None] * F + c[None, :]
    w_scale += column // 128 * KB
    acc = tl.zeros([BM, BN], tl.float32)
    a_scale = tl.load(act_scales + row)
    b_scale = tl.load(w_scale)
    for k in tl.range(0, KB, num_stages=STAGES):
        a = tl.load(a_at + k * 128)
        b = tl.load(b_at + k * 128)
        after = tl.minimum(k + 1, KB - 1)
        a_next = tl.load(act_scales + after * R.to(tl.int64) + row)
        b_next = tl.load(w_scale + after)
        acc += tl.dot(a, tl.trans(b)) * a_scale[:, None] * b_scale[None, :]
        a_scale = a_next
        b_scale = b_next
    to = y + row[:, None] * H + column[None, :]
    tl.store(to, acc.to(y.dtype.element_ty), mask=(i < count)[:, None])


@triton.jit
def _combine(
    y, slots, weights, gate, residual, norm, total, normed, quantised, scales, T, eps,
    TOP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One token: residual + shared row + weighted rows, then the next norm and its FP8 form."""
    t = tl.program_id(0).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    d = tl.arange(0, HP)[None, :]
    live = d < H
    acc = tl.load(residual + t * H + d, mask=live, other=0.0).to(tl.float32)
    row = tl.load(y + (t + T * TOP) * H + d, mask=live, other=0.0).to(tl.float32)
    acc += row * tl.load(gate + t)
    for j in tl.static_range(TOP):
        slot = tl.load(slots + t * TOP + j).to(tl.int64)
        row = tl.load(y + slot * H + d, mask=live, other=0.0).to(tl.float32)
        acc += row * tl.load(weights + t * TOP + j)
    rounded = acc.to(total.dtype.element_ty)
    tl.store(total + t * H + d, rounded, mask=live)
    norm_row(rounded.to(tl.float32), norm, normed, quantised, scales, t, d, live, T, eps,
             H, HP, 1, KEEP)  # fmt: skip


def route_sorted(logits: Tensor, top_k: int, norm_topk: bool, rows: int) -> Routing:
    """Choose experts for (T, E + 1) logits, the last being the shared gate's; tiles of ``rows``."""
    tokens, experts = logits.shape[0], logits.shape[1] - 1
    device, i32, f32 = logits.device, torch.int32, torch.float32
    ids = torch.empty(tokens, top_k, dtype=i32, device=device)
    ranks = torch.empty_like(ids)
    slots = torch.empty_like(ids)
    weights = torch.empty(tokens, top_k, dtype=f32, device=device)
    gate = torch.empty(tokens, dtype=f32, device=device)
    counts = torch.zeros(experts, dtype=i32, device=device)
    starts = torch.empty(experts, dtype=i32, device=device)
    order = torch.empty(tokens * (top_k + 1), dtype=i32, device=device)
    most = tokens * top_k // rows + experts + triton.cdiv(tokens, rows)
    tiles = torch.empty(most, 4, dtype=i32, device=device)
    wide = triton.next_power_of_2(experts)
    _route[(tokens,)](
        logits, ids, ranks, weights, gate, counts, tokens, logits.stride(0), E=experts, EP=wide,
        TOP=top_k, TP=triton.next_power_of_2(top_k), BT=1, NORM_TOPK=norm_topk, num_warps=1,
    )  # fmt: skip
    _tiles[(1,)](
        counts, starts, tiles, tokens, most, E=experts, EP=wide, TOP=top_k, BM=rows, BLOCK=1024,
        num_warps=4,
    )  # fmt: skip
    _place[(triton.cdiv(tokens * top_k, PLACED),)](
        ids, ranks, starts, slots, order, tokens, TOP=top_k, BLOCK=PLACED, num_warps=4
    )
    return Routing(weights, gate, slots, order, tiles, counts)


def experts_rows(
    x: Tensor,
    scales: Tensor,
    routing: Routing,
    experts: tuple[Tensor, Tensor, Tensor, Tensor],
    shared: tuple[Tensor, Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    gate_up: Tile = GATE_UP,
    down: Tile = DOWN,
) -> Tensor:
    """One row (H,) for every choice and, after them, for every token by the shared expert.

    Args:
        x: (T, H) e4m3; scales: (H / 128, T).
        routing: from ``route_sorted`` with ``gate_up.rows``; both tiles have the same rows.
        experts: gate_up (E, 2F, H) e4m3 and block scales, down (E, H, F) and block scales.
        shared: the same without the first axis.
        dtype: of the rows.
        gate_up, down: launch choices.
    """
    w1, s1, w2, s2 = experts
    v1, u1, v2, u2 = shared
    (count, hidden, inner), tokens = w2.shape, x.shape[0]
    rows = len(routing.tokens)
    act = torch.empty(rows, inner, dtype=FP8, device=x.device)
    act_scales = torch.empty(inner // 128, rows, dtype=torch.float32, device=x.device)
    y = torch.empty(rows, hidden, dtype=dtype, device=x.device)
    shape = {"E": count, "H": hidden, "F": inner, "BM": gate_up.rows}
    tiles = len(routing.tiles)
    _gate_up[(tiles * (inner // 128),)](
        x, scales, routing.tokens, routing.tiles, w1, s1, v1, u1, act, act_scales, tokens, rows,
        STAGES=gate_up.stages, num_warps=gate_up.warps,
        num_stages=gate_up.stages, **shape,
    )  # fmt: skip
    _down[(tiles * (hidden // down.columns),)](
        act, act_scales, routing.tiles, w2, s2, v2, u2, y, rows, BN=down.columns,
        STAGES=down.stages, num_warps=down.warps, num_stages=down.stages,
        **shape,
    )  # fmt: skip
    return y


def combine(
    y: Tensor, routing: Routing, residual: Tensor, norm_weight: Tensor, eps: float,
    *, keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum of the rows of each token and the residual, and the next norm of it.

    Returns:
        ``(total, normed, quantised, scales)`` as ``norm_quantised`` does.
    """
    tokens, hidden = residual.shape
    total = torch.empty_like(residual)
    normed = torch.empty(
        tokens if keep else 0, hidden, dtype=residual.dtype, device=residual.device
    )
    quantised = torch.empty(tokens, hidden, dtype=FP8, device=residual.device)
    scales = torch.empty(hidden // 128, tokens, dtype=torch.float32, device=residual.device)
    _combine[(tokens,)](
        y, routing.slots, routing.weights, routing.gate, residual, norm_weight, total, normed,
        quantised, scales, tokens, eps, TOP=routing.slots.shape[1], H=hidden,
        HP=triton.next_power_of_2(hidden), KEEP=keep, num_warps=8,
    )  # fmt: skip
    return total, normed, quantised, scales
