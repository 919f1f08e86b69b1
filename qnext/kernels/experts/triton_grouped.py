"""Triton MoE of 2..256 tokens: sort by expert on the device, each expert's weights read once.

``_choose`` finds each token's experts; ``_place`` sorts the choices by counting, every program for
its own ones, so that there is neither a serial pass nor an atomic. The choices in sorted order are
also the tasks: one at every TILE-th choice of an expert does up to TILE tokens, the others leave
at once; the first tasks are the shared expert's. Few tokens take ``_few_gate_up``, a GEMV whose
weights stay in registers for the task's tokens; more take ``_grouped_gate_up``, with the weights
on the M side of ``tl.dot`` and the tokens on its narrow N side. ``_combine`` adds each token's
slots in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qnext.kernels.experts.triton_single import (
    _swiglu_rows,
    any_warp,
    best_key,
    key_index,
    key_value,
    load_keys,
    sort_keys_lowest,
)
from qnext.kernels.linear.triton import linear, norm_rows, skinny_config

MAX_TOKENS = 256
TILE = 16
#: tokens up to which a task has about one token and the GEMV is read-bound
FEW = 16


@triton.jit
def _choose(
    logits, ids, weights, E: tl.constexpr, TOP: tl.constexpr, BF16: tl.constexpr,
    NORM_TOPK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The experts of one token, best first, and their weights; one warp."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0)
    value, keys = load_keys(logits + t * (E + 1), E, BF16, 1)
    best = best_key(keys)
    top = key_value(best, BF16)
    lowest = best * 0 + sort_keys_lowest(BF16)
    which = tl.arange(0, 16)
    chosen = tl.zeros([16], tl.int32)
    weight = tl.zeros([16], tl.float32)
    for i in tl.static_range(TOP):
        chosen = tl.where(which == i, any_warp(key_index(best, E)), chosen)
        weight = tl.where(which == i, any_warp(tl.exp(key_value(best, BF16) - top)), weight)
        keys = tl.where(keys == best[:, :, None, None], lowest[:, :, None, None], keys)
        best = best_key(keys)
    if NORM_TOPK:
        total = tl.sum(weight, axis=0)
    else:
        every = tl.exp(value - top[:, :, None, None])
        total = any_warp(tl.sum(tl.sum(every, axis=2), axis=2))
    tl.store(ids + t * TOP + which, chosen, mask=which < TOP)
    tl.store(weights + t * TOP + which, weight / total, mask=which < TOP)


@triton.jit
def _place(
    ids, weights, tokens, sorted_weights, slots, tasks, A,
    TOP: tl.constexpr, BLOCK: tl.constexpr, BA: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Sorted place of BLOCK choices: how many go before them, counted against all A."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = mine < A
    expert = tl.load(ids + mine, mask=live, other=0, cache_modifier=".cg")
    smaller = tl.zeros([BLOCK], tl.int32)
    rank = tl.zeros([BLOCK], tl.int32)
    same = tl.zeros([BLOCK], tl.int32)
    for b0 in range(0, A, BA):
        b = b0 + tl.arange(0, BA)
        other = tl.load(ids + b, mask=b < A, other=2147483647, cache_modifier=".cg")[None, :]
        equal = other == expert[:, None]
        smaller += tl.sum((other < expert[:, None]).to(tl.int32), axis=1)
        same += tl.sum(equal.to(tl.int32), axis=1)
        rank += tl.sum((equal & (b[None, :] < mine[:, None])).to(tl.int32), axis=1)
    place = smaller + rank
    weight = tl.load(weights + mine, mask=live, other=0.0, cache_modifier=".cg")
    tl.store(tokens + place, mine // TOP, mask=live)
    tl.store(sorted_weights + place, weight, mask=live)
    tl.store(slots + mine, place, mask=live)
    tl.store(tasks + place * 2, expert, mask=live)
    rows = tl.where(rank % TILE == 0, tl.minimum(same - rank, TILE), 0)
    tl.store(tasks + place * 2 + 1, rows, mask=live)


@triton.jit
def _task(tasks, index, T, TILE: tl.constexpr):
    """(routed?, expert, first row, rows); the shared expert's tasks come first."""
    shared = tl.cdiv(T, TILE)
    routed = index >= shared
    start = tl.where(routed, index - shared, index * TILE)
    expert = tl.load(tasks + start * 2, mask=routed, other=0, cache_modifier=".cg")
    rows = tl.load(tasks + start * 2 + 1, mask=routed, other=0, cache_modifier=".cg")
    rows = tl.where(routed, rows, tl.minimum(T - start, TILE))
    return routed, expert.to(tl.int64), start, rows


@triton.jit
def _few_gate_up(
    x, logits, tokens, weights, tasks, w, scale, sw, sscale, act, T,
    E: tl.constexpr, TOP: tl.constexpr, H: tl.constexpr, F: tl.constexpr, BN: tl.constexpr,
    KC: tl.constexpr, KB: tl.constexpr, TILE: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One task, its tokens one after the other; a repeated tile comes from the cache."""
    first = tl.program_id(0) * BN
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    routed, expert, start, rows = _task(tasks, tl.program_id(1), T, TILE)
    w = tl.where(routed, w + expert * (2 * F * H), sw)
    if FP8:
        scale = tl.where(routed, scale + expert * ((2 * F // 128) * (H // 128)), sscale)
    at = first + tl.arange(0, BN)
    for i in range(rows):
        token = tl.load(tokens + start + i, mask=routed, other=0, cache_modifier=".cg")
        weight = tl.load(weights + start + i, mask=routed, other=0.0, cache_modifier=".cg")
        token = tl.where(routed, token, start + i)
        open_ = tl.load(logits + token * (E + 1) + E, cache_modifier=".cg")
        weight = tl.where(routed, weight, tl.sigmoid(open_))
        out = _swiglu_rows(x + token * H, x, w, scale, first, 0.0, H, F, BN, KC, KB, FP8, False)
        to = tl.where(routed, start + i, T * TOP + start + i)
        tl.store(act + to * F + at, (out * weight).to(act.dtype.element_ty))


@triton.jit
def _grouped_gate_up(
    x, logits, tokens, weights, tasks, w, scale, sw, sscale, act, T,
    E: tl.constexpr, TOP: tl.constexpr, H: tl.constexpr, F: tl.constexpr, BN: tl.constexpr,
    TP: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    FP8: tl.constexpr, F32: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first = tl.program_id(0) * BN
    routed, expert, start, rows = _task(tasks, tl.program_id(1), T, TILE)
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
    at = w + row[:, None] * H + k[None, :]
    x_at = x + token[None, :] * H + k[:, None]
    if FP8:
        scale = tl.where(routed, scale + expert * ((2 * F // 128) * (H // 128)), sscale)
        scale += first // 128 * (H // 128)
    for k0 in tl.range(0, H, BK, num_stages=STAGES):
        wg = tl.load(at + k0, eviction_policy="evict_first").to(wide)
        wu = tl.load(at + F * H + k0, eviction_policy="evict_first").to(wide)
        xn = tl.load(x_at + k0, mask=live[None, :], other=0.0).to(wide)
        if FP8:
            gate += tl.dot(wg, xn, input_precision="ieee") * tl.load(scale + k0 // 128)
            up_scale = tl.load(scale + (F // 128) * (H // 128) + k0 // 128)
            up += tl.dot(wu, xn, input_precision="ieee") * up_scale
        else:
            gate = tl.dot(wg, xn, gate, input_precision="ieee")
            up = tl.dot(wu, xn, up, input_precision="ieee")
    out = gate * tl.sigmoid(gate) * up * weight[None, :]
    to = tl.where(routed, start + i, T * TOP + start + i)
    tl.store(act + to[None, :] * F + row[:, None], out.to(act.dtype.element_ty),
             mask=live[None, :])  # fmt: skip


@triton.jit
def _grouped_down(
    act, tasks, w, scale, sw, sscale, y, T,
    TOP: tl.constexpr, H: tl.constexpr, F: tl.constexpr, BN: tl.constexpr, TP: tl.constexpr,
    TILE: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, FP8: tl.constexpr,
    F32: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    first = tl.program_id(0) * BN
    if PDL:
        gdc_wait()
    routed, expert, start, rows = _task(tasks, tl.program_id(1), T, TILE)
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
        acc += tl.load(y + slot * H + column).to(tl.float32)
    acc += tl.load(res + token * H + column).to(tl.float32)
    tl.store(out + token * H + column, acc.to(out.dtype.element_ty))


def workspace(tokens: int, top_k: int, hidden: int, inner: int, experts: int, dtype, device):
    """Buffers of ``moe`` by name."""

    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    a, i32, f32 = tokens * top_k, torch.int32, torch.float32
    return {
        "logits": new(tokens, experts + 1, dtype=f32), "normed": new(tokens, hidden, dtype=dtype),
        "ids": new(a, dtype=i32), "chosen": new(a, dtype=f32), "tokens": new(a, dtype=i32),
        "weights": new(a, dtype=f32), "slots": new(a, dtype=i32), "tasks": new(a * 2, dtype=i32),
        "act": new(a + tokens, inner, dtype=dtype), "y": new(a + tokens, hidden, dtype=f32),
    }  # fmt: skip


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

    ``config``: ``few`` 1 or 0 (the GEMV or the tensor cores for gate_up), ``FN``/``KC``/``fwarps``
    its channels per program, K chunks in registers and warps; ``BN``/``BD`` weight rows per
    program of gate_up and down on the tensor cores, ``BK``, ``S`` and ``SD`` stages, ``warps``,
    ``dwarps``.
    """
    w1, s1, w2, s2 = experts
    v1, u1, v2, u2 = shared
    (e, h, i), t = w2.shape, hidden.shape[0]
    fp8 = s1 is not None
    c = {"few": t <= FEW, "FN": 8, "KC": 2, "fwarps": 4, "BN": 64, "BD": 64, "BK": 128, "S": 4}
    c |= {"SD": 4, "warps": 4, "dwarps": 4} | (config or {})
    b = buffers or workspace(t, top_k, h, i, e, hidden.dtype, hidden.device)
    out = torch.empty_like(hidden) if out is None else out
    x = norm_rows(hidden, norm_weight, eps, b["normed"], pdl)
    for t0 in range(0, t, 64):
        linear(x[t0 : t0 + 64], router, out=b["logits"][t0 : t0 + 64], pdl=pdl,
               config=skinny_config(e + 1, h, False, min(t, 64)))  # fmt: skip
    _choose[(t,)](
        b["logits"], b["ids"], b["chosen"], E=e, TOP=top_k, BF16=hidden.dtype == torch.bfloat16,
        NORM_TOPK=norm_topk_prob, PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip
    choices = t * top_k
    _place[(triton.cdiv(choices, 16),)](
        b["ids"], b["chosen"], b["tokens"], b["weights"], b["slots"], b["tasks"], choices,
        TOP=top_k, BLOCK=16, BA=128, TILE=TILE, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    count = choices + triton.cdiv(t, TILE)
    shape = {"TOP": top_k, "H": h, "F": i, "TILE": TILE, "FP8": fp8, "PDL": pdl, "launch_pdl": pdl}
    tile = {"TP": 8 if t <= 8 else 16, "BK": c["BK"], "F32": hidden.dtype == torch.float32}
    sources = (b["logits"], b["tokens"], b["weights"], b["tasks"], w1, s1 if fp8 else w1, v1,
               u1 if fp8 else v1, b["act"])  # fmt: skip
    if c["few"]:
        unit = 4 if fp8 else 2
        _few_gate_up[(i // c["FN"], count)](
            x, *sources, t, E=e, BN=c["FN"], KC=min(h // (unit * 128), c["KC"] * 4 // unit),
            KB=unit, num_warps=c["fwarps"], **shape,
        )  # fmt: skip
    else:
        _grouped_gate_up[(i // c["BN"], count)](
            x, *sources, t, E=e, BN=c["BN"], STAGES=c["S"], num_warps=c["warps"], **shape, **tile
        )
    _grouped_down[(h // c["BD"], count)](
        b["act"], b["tasks"], w2, s2 if fp8 else w2, v2, u2 if fp8 else v2, b["y"], t,
        BN=c["BD"], STAGES=c["SD"], num_warps=c["dwarps"], **shape, **tile,
    )  # fmt: skip
    bn = min(h, 512)
    _combine[(t, h // bn)](
        b["y"], b["slots"], hidden, out, t, TOP=top_k, H=h, BN=bn, PDL=pdl, launch_pdl=pdl
    )
    return out
