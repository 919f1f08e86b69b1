"""Triton MoE of one token in three launches: the batch-1 decode path.

``_router``: norm, router logits, shared gate, shared gate_up + SwiGLU. ``_gate_up``: every program
finds the expert of its slot from the logits itself (ten integer maxima within a warp; cheaper than
a launch), then streams its rows. ``_down``: every program owns output columns and adds up all slots, so the
order of the sum is fixed. ``_gate_up`` lets ``_down`` start only after its own wait: then the
logits are final, and ``_down`` can find the experts and fetch its weights while waiting.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qnext.kernels.linear.triton import (
    _gemv_rows,
    k_offsets,
    load_scales,
    norm_row,
    prefetch_l2,
    row_sums,
)


@triton.jit
def sort_keys(logits, index, E: tl.constexpr, BF16: tl.constexpr):
    """Integers in the order of the logits, ties to the lower index, the index in 16 low bits.

    BF16 logits (HF's router output) leave room for the index in 32 bits, which one ``redux``
    instruction can reduce; others take 64.
    """
    bits = logits.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if BF16:
        return ((order >> 16) << 16) | (E - 1 - index)
    else:
        return (order.to(tl.int64) << 16) | (E - 1 - index)


@triton.jit
def sort_keys_lowest(BF16: tl.constexpr):
    """A key below those of all numbers."""
    if BF16:
        return -2147483648
    else:
        return -9223372036854775807


@triton.jit
def key_index(key, E: tl.constexpr):
    """The index packed into a key."""
    return (E - 1 - (key & 0xFFFF)).to(tl.int32)


@triton.jit
def key_value(key, BF16: tl.constexpr):
    """The logit packed into a key."""
    if BF16:
        bits = key ^ ((key >> 31) & 0x7FFF0000)
        return (bits & -65536).to(tl.float32, bitcast=True)
    else:
        order = (key >> 16).to(tl.int32)
        return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_keys(logits, E: tl.constexpr, BF16: tl.constexpr, WARPS: tl.constexpr):
    """Values and sort keys [1, WARPS, E/128, 128] of one token, rounded to BF16 where the model is.

    Every warp holds all experts (see ``k_offsets``): ``best_key`` then needs no barrier, and ten
    maxima in a row take half a microsecond instead of one and a half.
    """
    L: tl.constexpr = E if E < 128 else 128
    index = tl.arange(0, E // L)[None, None, :, None] * L + tl.arange(0, L)[None, None, None, :]
    index = tl.broadcast_to(index, [1, WARPS, E // L, L])
    value = tl.load(logits + index, cache_modifier=".cg")
    if BF16:
        value = value.to(tl.bfloat16).to(tl.float32)
    return value, sort_keys(value, index, E, BF16)


@triton.jit
def best_key(keys):
    """Largest key, one copy per warp: [1, WARPS]."""
    return tl.max(tl.max(keys, axis=2), axis=2)


@triton.jit
def any_warp(x):
    """The scalar of which x [1, WARPS] holds copies."""
    return tl.max(tl.max(x, axis=1), axis=0)


@triton.jit
def _swiglu_rows(
    x, norm, w, scale, first, eps, H: tl.constexpr, F: tl.constexpr, BN: tl.constexpr,
    KC: tl.constexpr, KB: tl.constexpr, FP8: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of intermediate channels first..first+BN from x [H], normalised if NORM."""
    CH: tl.constexpr = KC * KB * 128
    columns = k_offsets(KC, KB)
    rows = (first + tl.arange(0, BN))[None, :, None, None]
    gate = tl.zeros([BN], tl.float32)
    up = tl.zeros([BN], tl.float32)
    square = tl.zeros([KB, 1, KC, 128], tl.float32)
    for c in tl.static_range(H // CH):
        xv = tl.load(x + c * CH + columns).to(tl.float32)
        if NORM:
            square += xv * xv
            xv *= 1.0 + tl.load(norm + c * CH + columns).to(tl.float32)
        xg = xv
        xu = xv
        if FP8:
            xg = xv * load_scales(scale, first // 128, c * CH, H, KC, KB)
            xu = xv * load_scales(scale, (F + first) // 128, c * CH, H, KC, KB)
        at = w + rows * H + c * CH + columns
        wg = tl.load(at, eviction_policy="evict_first")
        wu = tl.load(at + F * H, eviction_policy="evict_first")
        gate += row_sums(wg, xg)
        up += row_sums(wu, xu)
    if NORM:
        rstd = tl.rsqrt(tl.sum(tl.reshape(square, [KB * KC * 128]), axis=0) / H + eps)
        gate *= rstd
        up *= rstd
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _router(
    x, norm, router, w, scale, logits, xn, act, eps, E, TOP,
    H: tl.constexpr, F: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, KC: tl.constexpr,
    KB: tl.constexpr, KR: tl.constexpr, P: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    tiles: tl.constexpr = F // BN
    if pid == 0:
        if PDL:
            gdc_wait()
        norm_row(x, norm, xn, eps, H, P)
    elif pid <= tiles:
        first = (pid - 1) * BN
        if PDL:
            size: tl.constexpr = BN * H * w.dtype.element_ty.primitive_bitwidth // 8
            prefetch_l2(w + first * H, size)
            prefetch_l2(w + (F + first) * H, size)
            gdc_wait()
        value = _swiglu_rows(x, norm, w, scale, first, eps, H, F, BN, KC, KB, FP8, True)
        at = act + TOP * F + first + tl.arange(0, BN)
        tl.store(at, value.to(act.dtype.element_ty))
    else:
        _gemv_rows(x, norm, router, scale, x, logits, logits, logits, (pid - tiles - 1) * BR,
                   E + 1, 0, 0, eps, pid, 1, H, BR, KR, 2, False, True, False, False, PDL,
                   PDL)  # fmt: skip


@triton.jit
def _gate_up(
    xn, logits, w, scale, act, eps,
    E: tl.constexpr, TOP: tl.constexpr, H: tl.constexpr, F: tl.constexpr, BN: tl.constexpr,
    KC: tl.constexpr, KB: tl.constexpr, FP8: tl.constexpr, BF16: tl.constexpr,
    NORM_TOPK: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BN
    slot = tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    value, keys = load_keys(logits, E, BF16, WARPS)
    best = best_key(keys)
    lowest = best * 0 + sort_keys_lowest(BF16)
    top = key_value(best, BF16)
    total = top * 0.0 + 1.0
    for _ in range(slot):
        keys = tl.where(keys == best[:, :, None, None], lowest[:, :, None, None], keys)
        best = best_key(keys)
        total += tl.exp(key_value(best, BF16) - top)
    expert = any_warp(key_index(best, E)).to(tl.int64)
    mine = key_value(best, BF16)
    if PDL:
        size: tl.constexpr = BN * H * w.dtype.element_ty.primitive_bitwidth // 8
        prefetch_l2(w + (expert * (2 * F) + first) * H, size)
        prefetch_l2(w + (expert * (2 * F) + F + first) * H, size)
    for _ in range(slot + 1, TOP):
        keys = tl.where(keys == best[:, :, None, None], lowest[:, :, None, None], keys)
        best = best_key(keys)
        total += tl.exp(key_value(best, BF16) - top)
    if not NORM_TOPK:
        total = tl.sum(tl.sum(tl.exp(value - top[:, :, None, None]), axis=2), axis=2)
    weight = any_warp(tl.exp(mine - top) / total)
    out = _swiglu_rows(xn, xn, w + expert * (2 * F * H),
                       scale + expert * ((2 * F // 128) * (H // 128)), first, eps, H, F, BN, KC,
                       KB, FP8, False)  # fmt: skip
    tl.store(act + slot * F + first + tl.arange(0, BN), (out * weight).to(act.dtype.element_ty))


@triton.jit
def _down(
    logits, act, w, scale, sw, sscale, res, y,
    E: tl.constexpr, TOP: tl.constexpr, H: tl.constexpr, F: tl.constexpr, BN: tl.constexpr,
    KE: tl.constexpr, KB: tl.constexpr, FP8: tl.constexpr, BF16: tl.constexpr,
    WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Slot TOP is the shared expert."""
    if PDL:
        gdc_launch_dependents()
    first = tl.program_id(0) * BN
    size: tl.constexpr = BN * F * w.dtype.element_ty.primitive_bitwidth // 8
    if PDL:
        prefetch_l2(sw + first * F, size)
    _, keys = load_keys(logits, E, BF16, WARPS)
    which = tl.arange(0, 16)
    ids = tl.zeros([1, WARPS, 16], tl.int64)
    for i in tl.static_range(TOP):
        best = best_key(keys)
        lowest = best * 0 + sort_keys_lowest(BF16)
        keys = tl.where(keys == best[:, :, None, None], lowest[:, :, None, None], keys)
        expert = key_index(best, E).to(tl.int64)
        ids = tl.where(which[None, None, :] == i, expert[:, :, None], ids)
        if PDL:
            prefetch_l2(w + (expert * H + first) * F, size)
    ids = tl.max(tl.max(ids, axis=1), axis=0)
    gate = tl.sigmoid(tl.load(logits + E, cache_modifier=".cg"))
    if PDL:
        gdc_wait()
    CH: tl.constexpr = KB * 128
    kb = tl.arange(0, KB)[:, None, None, None]
    columns = kb * 128 + tl.arange(0, 128)[None, None, None, :]
    rows = (first + tl.arange(0, BN))[None, :, None, None]
    acc = tl.zeros([BN], tl.float32)
    for s in tl.static_range(0, TOP + 1, KE):
        slot = s + tl.arange(0, KE)
        expert = tl.sum(tl.where(which[None, :] == slot[:, None], ids[None, :], 0), axis=1)
        expert = expert[None, None, :, None]
        slot = slot[None, None, :, None]
        for c in tl.static_range(F // CH):
            xv = tl.load(act + slot * F + c * CH + columns, mask=slot <= TOP, other=0.0)
            xv = xv.to(tl.float32) * tl.where(slot == TOP, gate, 1.0)
            if FP8:
                block = expert * ((H // 128) * (F // 128))
                at = tl.where(slot < TOP, scale + block, sscale + slot * 0)
                at += (first // 128) * (F // 128) + c * KB + kb
                xv *= tl.load(at, mask=slot <= TOP, other=0.0).to(tl.float32)
            at = tl.where(slot < TOP, w + expert * (H * F), sw + slot * 0)
            at += rows * F + c * CH + columns
            wt = tl.load(at, mask=slot <= TOP, other=0.0, eviction_policy="evict_first")
            acc += row_sums(wt, xv)
    at = first + tl.arange(0, BN)
    acc += tl.load(res + at).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty))


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
    logits: Tensor | None = None,
    normed: Tensor | None = None,
    act: Tensor | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
    config: dict[str, int] | None = None,
) -> Tensor:
    """Norm, MoE block and residual add of one token (spec section 5).

    Args:
        hidden: (1, H) residual stream.
        norm_weight: (H,) zero-centred weight of the norm before the block.
        router: (E + 1, H), the router's rows and then the shared expert's gate row.
        experts: gate_up (E, 2F, H), its scales, down (E, H, F), its scales; scales are None for
            BF16, else (E, rows/128, columns/128).
        shared: the same without the leading axis.
        top_k: experts per token.
        norm_topk_prob: divide the chosen probabilities by their sum.
        eps: of the norm.
        logits: fp32 (E + 1,) workspace.
        normed: (H,) workspace in the dtype of ``hidden``.
        act: (top_k + 1, F) workspace in the dtype of ``hidden``.
        out: (1, H), may be ``hidden``.
        pdl: launch with programmatic stream serialization.
        config: ``BR`` router rows, ``BS`` shared and ``BN`` expert gate_up channels per program,
            ``KC`` K chunks in registers, ``BD`` rows of down, ``KE`` slots at once, ``warps`` and
            ``dwarps`` (down).
    """
    w1, s1, w2, s2 = experts
    v1, u1, v2, u2 = shared
    e, h, i = w2.shape
    fp8 = s1 is not None
    # BN 8, KC 2: 640 programs of few registers are on the GPU all at once, so that the search
    # for the experts is paid once; BD 16: 128 programs, one per multiprocessor
    c = {"BR": 4, "BS": 8, "BN": 8, "KC": 2, "BD": 16, "KE": 4, "warps": 4, "dwarps": 8}
    c |= config or {}
    logits = hidden.new_empty(e + 1, dtype=torch.float32) if logits is None else logits
    normed = hidden.new_empty(h) if normed is None else normed
    act = hidden.new_empty(top_k + 1, i) if act is None else act
    out = torch.empty_like(hidden) if out is None else out
    unit = 4 if fp8 else 2
    shape = {"H": h, "F": i, "KB": unit, "FP8": fp8, "PDL": pdl, "launch_pdl": pdl}
    chunks = min(h // (unit * 128), c["KC"] * (1 if fp8 else 2))
    _router[(1 + i // c["BS"] + triton.cdiv(e + 1, c["BR"]),)](
        hidden, norm_weight, router, v1, u1 if fp8 else v1, logits, normed, act, eps, e, top_k,
        BR=c["BR"], BN=c["BS"], KC=chunks, KR=min(h // 256, 8),
        P=triton.next_power_of_2(h), num_warps=4, **shape,
    )  # fmt: skip
    choice = {"E": e, "TOP": top_k, "BF16": hidden.dtype == torch.bfloat16}
    _gate_up[(i // c["BN"], top_k)](
        normed, logits, w1, s1 if fp8 else w1, act, eps, BN=c["BN"], KC=chunks,
        NORM_TOPK=norm_topk_prob, WARPS=c["warps"], num_warps=c["warps"], **choice, **shape,
    )  # fmt: skip
    _down[(h // c["BD"],)](
        logits, act, w2, s2 if fp8 else w2, v2, u2 if fp8 else v2, hidden, out, BN=c["BD"],
        KE=c["KE"], WARPS=c["dwarps"], num_warps=c["dwarps"], **choice, **shape,
    )  # fmt: skip
    return out
