"""Routing of 1..256 tokens in one launch: top-k, weights, and the experts' lists of tokens.

One warp per token. Atomic counters give each choice its place in its expert's list, so no sort
and no second launch are needed. Which place a token gets depends on timing, its result does not:
an expert treats its tokens independently, and the sum over a token's experts has a fixed order.
The experts are thus reached in any order; the outputs are the same bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qnext.kernels.experts.triton_single import (
    any_warp,
    best_key,
    key_index,
    key_value,
    sort_keys,
    sort_keys_lowest,
)


@triton.jit
def _route(
    logits, counts, tasks, lists, weights, gates, T, cap,
    PARTS: tl.constexpr, E: tl.constexpr, TOP: tl.constexpr, TILE: tl.constexpr,
    BF16: tl.constexpr, NORM_TOPK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0)
    L: tl.constexpr = E if E < 128 else 128
    index = tl.arange(0, E // L)[None, None, :, None] * L + tl.arange(0, L)[None, None, None, :]
    value = tl.load(logits + t * (E + 1) + index)
    gate = tl.load(logits + t * (E + 1) + E)
    for p in tl.static_range(1, PARTS):
        value += tl.load(logits + (p * T + t) * (E + 1) + index)
        gate += tl.load(logits + (p * T + t) * (E + 1) + E)
    if BF16:
        value = value.to(tl.bfloat16).to(tl.float32)
    keys = sort_keys(value, index, E, BF16)
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
    live = which < TOP
    tl.store(weights + t * TOP + which, weight / total, mask=live)
    tl.store(gates + t, tl.sigmoid(gate))
    place = tl.atomic_add(counts + chosen, 1, mask=live, sem="relaxed")
    live &= place < cap  # counters that nobody cleared must not lead outside the lists
    tl.store(lists + chosen * cap + place, t * TOP + which, mask=live)
    opens = live & (place % TILE == 0)
    task = tl.atomic_add(counts + E + which * 0, 1, mask=opens, sem="relaxed")
    tl.store(tasks + task, chosen | (place << 16), mask=opens & (task < T * TOP))


def buffers(
    tokens: int, top_k: int, experts: int, tile: int, device: torch.device | str
) -> dict[str, Any]:
    """Buffers of ``route_tasks``; ``counts`` (zero before every call) ends with the number of tasks."""
    i32, f32 = torch.int32, torch.float32
    size = triton.next_power_of_2(experts + 1)
    return {
        "counts": torch.zeros(size, dtype=i32, device=device),
        "tasks": torch.empty(tokens * top_k, dtype=i32, device=device),
        "lists": torch.empty(experts, tokens, dtype=i32, device=device),
        "weights": torch.empty(tokens * top_k, dtype=f32, device=device),
        "gates": torch.empty(tokens, dtype=f32, device=device),
        "tile": tile,
    }


def route_tasks(
    logits: Tensor,
    out: dict[str, Any],
    *,
    top_k: int,
    bf16: bool = True,
    norm_topk_prob: bool = True,
    pdl: bool = False,
) -> dict[str, Any]:
    """Tasks for the experts from router logits.

    Args:
        logits: (P, T, E + 1) fp32 terms of the logits; the last column is the shared expert's.
        out: from ``buffers``: ``lists`` (E, T) choices (token * top_k + rank) of each expert,
            ``counts`` how many, ``tasks`` expert and first place of each task in 16 bits,
            ``weights`` of the choices, ``gates`` of the shared expert.
        top_k: experts per token.
        bf16: round the logits to BF16 first, as the model's router does.
        norm_topk_prob: divide the chosen probabilities by their sum.
        pdl: launch with programmatic stream serialization.
    """
    parts, t, width = logits.shape
    _route[(t,)](
        logits, out["counts"], out["tasks"], out["lists"], out["weights"], out["gates"], t,
        out["lists"].shape[1], PARTS=parts, E=width - 1, TOP=top_k, TILE=out["tile"], BF16=bf16,
        NORM_TOPK=norm_topk_prob, PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip
    return out
