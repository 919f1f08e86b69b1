"""Triton MoE of 2..256 tokens: route and sort on the device, one tile of tokens per expert.

``_choose`` turns router logits into a dense (T, E) matrix of routing weights; ``_dispatch`` sorts
its nonzeros by expert into tasks of up to 16 tokens, without atomics and without the host. The
two GEMMs run one task per program row, weights on the M side of ``tl.dot`` and the task's tokens
on its narrow N side, so that each expert's weights are read once; the shared expert is a task of
its own. ``_combine`` adds each token's slots in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qnext.kernels.experts.triton_single import sort_keys
from qnext.kernels.linear.triton import linear

MAX_TOKENS = 256
TILE = 16


@triton.jit
def _weights(
    logits, t0, T, E: tl.constexpr, TOP: tl.constexpr, TB: tl.constexpr, BF16: tl.constexpr,
    NORM_TOPK: tl.constexpr,
):  # fmt: skip
    """Routing weights [TB, E] of tokens t0.., zero where an expert was not chosen."""
    t = (t0 + tl.arange(0, TB))[:, None]
    e = tl.arange(0, E)[None, :]
    value = tl.load(logits + t * (E + 1) + e, mask=t < T, other=0.0)
    if BF16:
        value = value.to(tl.bfloat16).to(tl.float32)
    keys = sort_keys(value, e, E, BF16)
    lowest = tl.min(keys)
    chosen = keys != keys
    for _ in tl.static_range(TOP):
        best = keys == tl.max(keys, axis=1)[:, None]
        chosen |= best
        keys = tl.where(best, lowest, keys)
    p = tl.exp(value - tl.max(value, axis=1)[:, None])
    picked = tl.where(chosen & (t < T), p, 0.0)
    total = tl.sum(picked if NORM_TOPK else p, axis=1)
    return picked / tl.maximum(total, 1e-30)[:, None]


@triton.jit
def _choose(
    logits, dense, T, E: tl.constexpr, TOP: tl.constexpr, TB: tl.constexpr, BF16: tl.constexpr,
    NORM_TOPK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t0 = tl.program_id(0) * TB
    w = _weights(logits, t0, T, E, TOP, TB, BF16, NORM_TOPK)
    t = (t0 + tl.arange(0, TB))[:, None]
    tl.store(dense + t * E + tl.arange(0, E)[None, :], w, mask=t < T)


@triton.jit
def _dispatch(
    logits, dense, tokens, weights, slots, tasks, count, T,
    E: tl.constexpr, TOP: tl.constexpr, TB: tl.constexpr, TILE: tl.constexpr,
    FUSED: tl.constexpr, BF16: tl.constexpr, NORM_TOPK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: tokens and weights by expert, tasks (expert, start, stop), slots of a token."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    e = tl.arange(0, E)
    b = tl.arange(0, TB)
    if FUSED:
        w = _weights(logits, 0, T, E, TOP, TB, BF16, NORM_TOPK)
        counts = tl.sum((w > 0).to(tl.int32), axis=0)
    else:
        counts = tl.zeros([E], tl.int32)
        for t0 in range(0, T, TB):
            t = t0 + b
            at = dense + t[:, None] * E + e[None, :]
            w = tl.load(at, mask=(t < T)[:, None], other=0.0)
            counts += tl.sum((w > 0).to(tl.int32), axis=0)
    start = tl.cumsum(counts, axis=0) - counts
    pieces = (counts + TILE - 1) // TILE
    first = tl.cumsum(pieces, axis=0) - pieces
    tl.store(count, tl.sum(pieces, axis=0))
    for i in range(tl.max(pieces, axis=0)):
        has = i < pieces
        at = tasks + (first + i) * 3
        tl.store(at, e, mask=has)
        tl.store(at + 1, start + i * TILE, mask=has)
        tl.store(at + 2, tl.minimum(start + i * TILE + TILE, start + counts), mask=has)
    running = start
    for t0 in range(0, T, TB):
        t = t0 + b
        if not FUSED:
            at = dense + t[:, None] * E + e[None, :]
            w = tl.load(at, mask=(t < T)[:, None], other=0.0)
        hit = (w > 0).to(tl.int32)
        place = running[None, :] + tl.cumsum(hit, axis=0) - hit
        tl.store(tokens + place, t[:, None] + tl.zeros_like(hit), mask=hit > 0)
        tl.store(weights + place, w, mask=hit > 0)
        rank = tl.cumsum(hit, axis=1) - hit
        tl.store(slots + t[:, None] * TOP + rank, place, mask=hit > 0)
        total = tl.sum(hit, axis=1)
        for j in tl.static_range(TOP):
            # a weight that underflowed to zero leaves a free slot; -1 marks it
            tl.store(slots + t * TOP + j, tl.full([TB], -1, tl.int32), mask=(t < T) & (j >= total))
        running += tl.sum(hit, axis=0)


@triton.jit
def _task(tasks, count, index, T, TILE: tl.constexpr):
    """(routed?, expert, first row, rows): tasks after the last are the shared expert's."""
    n = tl.load(count, cache_modifier=".cg")
    routed = index < n
    at = tasks + index * 3
    expert = tl.load(at, mask=routed, other=0, cache_modifier=".cg")
    start = tl.load(at + 1, mask=routed, other=0, cache_modifier=".cg")
    stop = tl.load(at + 2, mask=routed, other=0, cache_modifier=".cg")
    begin = (index - n) * TILE
    start = tl.where(routed, start, begin)
    rows = tl.where(routed, stop - start, tl.minimum(T - begin, TILE))
    return routed, expert.to(tl.int64), start, rows


@triton.jit
def _grouped_gate_up(
    x, norm, logits, tokens, weights, tasks, count, w, scale, sw, sscale, act, eps, T,
    E: tl.constexpr, TOP: tl.constexpr, H: tl.constexpr, F: tl.constexpr, BN: tl.constexpr,
    TP: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    FP8: tl.constexpr, F32: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first = tl.program_id(0) * BN
    routed, expert, start, rows = _task(tasks, count, tl.program_id(1), T, TILE)
    if rows <= 0:
        return
    w = tl.where(routed, w + expert * (2 * F * H), sw)
    i = tl.arange(0, TP)
    live = i < rows
    sorted_ = i < tl.where(routed, rows, 0)
    token = tl.load(tokens + start + i, mask=sorted_, other=0)
    token = tl.where(routed, token, start + i)
    weight = tl.load(weights + start + i, mask=sorted_, other=0.0)
    open_ = tl.load(logits + token * (E + 1) + E, mask=i < tl.where(routed, 0, rows), other=0.0)
    weight = tl.where(routed, weight, tl.sigmoid(open_))
    wide: tl.constexpr = tl.float32 if F32 else x.dtype.element_ty
    k = tl.arange(0, BK)
    row = first + tl.arange(0, BN)
    gate = tl.zeros([BN, TP], tl.float32)
    up = tl.zeros([BN, TP], tl.float32)
    square = tl.zeros([TP], tl.float32)
    at = w + row[:, None] * H + k[None, :]
    x_at = x + token[None, :] * H + k[:, None]
    if FP8:
        scale = tl.where(routed, scale + expert * ((2 * F // 128) * (H // 128)), sscale)
        scale += first // 128 * (H // 128)
    for k0 in tl.range(0, H, BK, num_stages=STAGES):
        wg = tl.load(at + k0, eviction_policy="evict_first").to(wide)
        wu = tl.load(at + F * H + k0, eviction_policy="evict_first").to(wide)
        xf = tl.load(x_at + k0, mask=live[None, :], other=0.0).to(tl.float32)
        square += tl.sum(xf * xf, axis=0)
        xn = (xf * (1.0 + tl.load(norm + k0 + k).to(tl.float32))[:, None]).to(x.dtype.element_ty)
        xn = xn.to(wide)
        if FP8:
            gate += tl.dot(wg, xn, input_precision="ieee") * tl.load(scale + k0 // 128)
            up_scale = tl.load(scale + (F // 128) * (H // 128) + k0 // 128)
            up += tl.dot(wu, xn, input_precision="ieee") * up_scale
        else:
            gate = tl.dot(wg, xn, gate, input_precision="ieee")
            up = tl.dot(wu, xn, up, input_precision="ieee")
    rstd = tl.rsqrt(square / H + eps)[None, :]
    gate *= rstd
    out = gate * tl.sigmoid(gate) * (up * rstd) * weight[None, :]
    to = tl.where(routed, start + i, T * TOP + start + i)
    tl.store(act + to[None, :] * F + row[:, None], out.to(act.dtype.element_ty),
             mask=live[None, :])  # fmt: skip


@triton.jit
def _grouped_down(
    act, tasks, count, w, scale, sw, sscale, y, T,
    TOP: tl.constexpr, H: tl.constexpr, F: tl.constexpr, BN: tl.constexpr, TP: tl.constexpr,
    TILE: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, FP8: tl.constexpr,
    F32: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    first = tl.program_id(0) * BN
    if PDL:
        gdc_wait()
    routed, expert, start, rows = _task(tasks, count, tl.program_id(1), T, TILE)
    if rows <= 0:
        return
    w = tl.where(routed, w + expert * (H * F), sw)
    if FP8:
        scale = tl.where(routed, scale + expert * ((H // 128) * (F // 128)), sscale)
        scale += first // 128 * (F // 128)
    i = tl.arange(0, TP)
    live = i < rows
    source = tl.where(routed, start + i, T * TOP + start + i)
    wide: tl.constexpr = tl.float32 if F32 else act.dtype.element_ty
    k = tl.arange(0, BK)
    row = first + tl.arange(0, BN)
    acc = tl.zeros([BN, TP], tl.float32)
    at = w + row[:, None] * F + k[None, :]
    x_at = act + source[None, :] * F + k[:, None]
    for k0 in tl.range(0, F, BK, num_stages=STAGES):
        wt = tl.load(at + k0, eviction_policy="evict_first").to(wide)
        xt = tl.load(x_at + k0, mask=live[None, :], other=0.0).to(wide)
        if FP8:
            acc += tl.dot(wt, xt, input_precision="ieee") * tl.load(scale + k0 // 128)
        else:
            acc = tl.dot(wt, xt, acc, input_precision="ieee")
    to = y + source[None, :] * H + row[:, None]
    tl.store(to, acc.to(y.dtype.element_ty), mask=live[None, :])


@triton.jit
def _combine(
    y, slots, res, out, T, TOP: tl.constexpr, H: tl.constexpr, BN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.load(y + (T * TOP + token) * H + column).to(tl.float32)
    for j in tl.static_range(TOP):
        slot = tl.load(slots + token * TOP + j, cache_modifier=".cg")
        used = column < tl.where(slot >= 0, H, 0)
        acc += tl.load(y + slot * H + column, mask=used, other=0.0).to(tl.float32)
    acc += tl.load(res + token * H + column).to(tl.float32)
    tl.store(out + token * H + column, acc.to(out.dtype.element_ty))


def workspace(tokens: int, top_k: int, hidden: int, inner: int, experts: int, dtype, device):
    """Buffers of ``moe`` by name."""

    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    a, i32, f32 = tokens * top_k, torch.int32, torch.float32
    return {
        "logits": new(tokens, experts + 1, dtype=f32), "dense": new(tokens, experts, dtype=f32),
        "tokens": new(a, dtype=i32), "weights": new(a, dtype=f32), "slots": new(a, dtype=i32),
        "tasks": new(max_tasks(tokens, top_k, experts) * 3, dtype=i32), "count": new(1, dtype=i32),
        "act": new(a + tokens, inner, dtype=dtype), "y": new(a + tokens, hidden, dtype=f32),
    }  # fmt: skip


def max_tasks(tokens: int, top_k: int, experts: int) -> int:
    """Most routed tasks that so many tokens can make."""
    return min(tokens * top_k, experts + tokens * top_k // TILE)


def moe(
    hidden: Tensor,
    norm_weight: Tensor,
    router: Tensor,
    experts: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    shared: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    *,
    top_k: int,
    norm_topk_prob: bool = True,
    eps: float = 1e-6,
    buffers: dict[str, Tensor] | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
    config: dict[str, int] | None = None,
) -> Tensor:
    """Norm, MoE block and residual add of up to 256 tokens; see ``triton_single``.

    ``config``: ``BN``/``BD`` weight rows per program of gate_up and down, ``BK``, ``S`` and
    ``SD`` stages, ``warps``, ``dwarps``.
    """
    w1, s1, w2, s2 = experts
    v1, u1, v2, u2 = shared
    (e, h, i), t = w2.shape, hidden.shape[0]
    fp8 = s1 is not None
    c = {"BN": 32, "BD": 64, "BK": 128, "S": 4, "SD": 4, "warps": 4, "dwarps": 4} | (config or {})
    b = buffers or workspace(t, top_k, h, i, e, hidden.dtype, hidden.device)
    out = torch.empty_like(hidden) if out is None else out
    bf16, f32 = hidden.dtype == torch.bfloat16, hidden.dtype == torch.float32
    if t <= TILE:
        linear(hidden, router, norm_weight=norm_weight, eps=eps, out=b["logits"], pdl=pdl,
               config=(16, 4, 4, 4))  # fmt: skip
    else:
        for t0 in range(0, t, TILE):
            linear(hidden[t0 : t0 + TILE], router, norm_weight=norm_weight, eps=eps,
                   out=b["logits"][t0 : t0 + TILE], pdl=pdl, config=(16, 4, 4, 4))  # fmt: skip
    options = {"E": e, "TOP": top_k, "BF16": bf16, "NORM_TOPK": norm_topk_prob, "PDL": pdl}
    block = min(TILE, triton.next_power_of_2(t))
    if t > TILE:
        _choose[(triton.cdiv(t, 4),)](
            b["logits"], b["dense"], t, TB=4, num_warps=4, launch_pdl=pdl, **options
        )
    _dispatch[(1,)](
        b["logits"], b["dense"], b["tokens"], b["weights"], b["slots"], b["tasks"], b["count"], t,
        TB=block, TILE=TILE, FUSED=t <= TILE, num_warps=8, launch_pdl=pdl, **options,
    )  # fmt: skip
    count = max_tasks(t, top_k, e) + triton.cdiv(t, TILE)
    shape = {"TOP": top_k, "H": h, "F": i, "TP": 8 if t <= 8 else 16, "TILE": TILE}
    shape |= {"BK": c["BK"], "FP8": fp8, "F32": f32, "PDL": pdl, "launch_pdl": pdl}
    _grouped_gate_up[(i // c["BN"], count)](
        hidden, norm_weight, b["logits"], b["tokens"], b["weights"], b["tasks"], b["count"],
        w1, s1 if fp8 else w1, v1, u1 if fp8 else v1, b["act"], eps, t, E=e, BN=c["BN"],
        STAGES=c["S"], num_warps=c["warps"], **shape,
    )  # fmt: skip
    _grouped_down[(h // c["BD"], count)](
        b["act"], b["tasks"], b["count"], w2, s2 if fp8 else w2, v2, u2 if fp8 else v2, b["y"], t,
        BN=c["BD"], STAGES=c["SD"], num_warps=c["dwarps"], **shape,
    )  # fmt: skip
    bn = min(h, 512)
    _combine[(t, h // bn)](
        b["y"], b["slots"], hidden, out, t, TOP=top_k, H=h, BN=bn, PDL=pdl, launch_pdl=pdl
    )
    return out
