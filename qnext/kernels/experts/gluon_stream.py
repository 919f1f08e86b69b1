"""Experts of 2..256 tokens on Hopper's FP8 tensor cores: their weights stream without a pause.

Two persistent launches. A task is an expert and up to TILE of its tokens (``triton_route``); the
programs go over (task, block of weight rows) in turn. The copy engine fills a ring of weight
tiles, and before a program ends a unit it has already asked for the first tiles of the next one:
memory never waits for a program to find its tokens. As in ``linear.gluon_stream`` weights are the
M side, tokens the N side, both e4m3, with scales applied in fp32 every 128 columns.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qnext.kernels.linear.gluon_stream import load_tile, tiles

load_cells = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _unit(tasks, counts, unit, units, T, E: gl.constexpr, TILE: gl.constexpr, BLOCKS: gl.constexpr):
    """(expert, first token, tokens, block of rows); expert E is the shared one, its tasks first."""
    live = unit < units
    task = unit // BLOCKS
    shared = (T + TILE - 1) // TILE
    routed = task >= shared
    packed = gl.load(tasks + task - shared, mask=live & routed, other=E)
    expert = packed & 0xFFFF
    start = gl.where(routed, packed >> 16, task * TILE)
    total = gl.load(counts + expert, mask=live & routed, other=0)
    total = gl.where(routed, total, T)
    return expert, start, gl.minimum(total - start, TILE), unit % BLOCKS


@gluon.jit
def _ask(w_desc, v_desc, row, column, expert, bar, buffer, pred, E: gl.constexpr):
    """A tile of the routed or of the shared expert."""
    load_tile(w_desc, [row, column], bar, buffer, pred=pred & (expert < E))
    load_tile(v_desc, [row, column], bar, buffer, pred=pred & (expert >= E))


@gluon.jit
def _gate_up(
    w_desc, v_desc, x, x_scale, scale, v_scale, tasks, counts, lists, weights, gates, act, T, cap,
    E: gl.constexpr, TOP: gl.constexpr, H: gl.constexpr, F: gl.constexpr, TILE: gl.constexpr,
    S: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """64 gate rows and the 64 up rows they belong to; silu(gate) * up * routing weight."""
    NK: gl.constexpr = H // 128
    BLOCKS: gl.constexpr = F // 64
    size: gl.constexpr = 2 * 64 * 128
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, TILE, 32]
    )
    load_l: gl.constexpr = (
        gl.BlockedLayout([1, TILE], [2, 16], [WARPS, 1], [1, 0])
        if (TILE == 8)
        else gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    )
    flat: gl.constexpr = gl.BlockedLayout([2, 1], [32, 1], [1, WARPS], [0, 1])
    x_kind: gl.constexpr = gl.NVMMASharedLayout(128, 8)
    ring = gl.allocate_shared_memory(gl.float8e4nv, [2 * S, 64, 128], w_desc.layout)
    held = gl.allocate_shared_memory(gl.float8e4nv, [NK, TILE, 128], x_kind)
    bars = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(S):
        mbarrier.init(bars.index(i), count=1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    step = gl.num_programs(0)
    unit = gl.program_id(0)
    units = (gl.load(counts + E) + (T + TILE - 1) // TILE) * BLOCKS
    if unit >= units:
        return
    expert, start, rows, block = _unit(tasks, counts, unit, units, T, E, TILE, BLOCKS)
    row = gl.where(expert < E, expert * (2 * F), 0) + block * 64
    for i in gl.static_range(S):
        bar = bars.index(i)
        mbarrier.expect(bar, size)
        _ask(w_desc, v_desc, row, i * 128, expert, bar, ring.index(2 * i), True, E)
        _ask(w_desc, v_desc, row + F, i * 128, expert, bar, ring.index(2 * i + 1), True, E)
    done = 0
    while unit < units:
        routed = expert < E
        following = unit + step
        more = following < units
        expert2, start2, rows2, block2 = _unit(tasks, counts, following, units, T, E, TILE, BLOCKS)
        row2 = gl.where(expert2 < E, expert2 * (2 * F), 0) + block2 * 64
        # tokens of the task, three times, in the layouts of their uses
        i0 = gl.arange(0, TILE, gl.SliceLayout(1, load_l))
        choice0 = gl.load(lists + expert * cap + start + i0, mask=(i0 < rows) & routed, other=0)
        token0 = gl.where(routed, choice0 // TOP, gl.minimum(start + i0, T - 1))
        k0 = gl.arange(0, 128, gl.SliceLayout(0, load_l))
        at = x + gl.expand_dims(token0, 1) * H + gl.expand_dims(k0, 0)
        for group in gl.static_range(NK):
            load_cells(held.index(group), at + group * 128)
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        i1 = gl.arange(0, TILE, gl.SliceLayout(0, mma))
        choice1 = gl.load(lists + expert * cap + start + i1, mask=(i1 < rows) & routed, other=0)
        token1 = gl.where(routed, choice1 // TOP, gl.minimum(start + i1, T - 1))
        at_scale = x_scale + token1 * NK
        w_scale = gl.where(routed, scale + expert.to(gl.int64) * (2 * F // 128 * NK), v_scale)
        w_scale += block // 2 * NK
        gate = gl.zeros([64, TILE], gl.float32, mma)
        up = gl.zeros([64, TILE], gl.float32, mma)
        for k in range(NK):
            slot = done % S
            bar = bars.index(slot)
            s = gl.load(at_scale + k)
            gate_scale = gl.load(w_scale + k)
            up_scale = gl.load(w_scale + F // 128 * NK + k)
            mbarrier.wait(bar, (done // S) & 1)
            zero = gl.zeros([64, TILE], gl.float32, mma)
            xk = held.index(k).permute([1, 0])
            g = warpgroup_mma(ring.index(2 * slot), xk, zero, use_acc=False, is_async=True)
            u = warpgroup_mma(ring.index(2 * slot + 1), xk, zero, use_acc=False, is_async=True)
            g, u = warpgroup_mma_wait(0, deps=(g, u))
            here = k + S < NK
            pred = here | more
            column = gl.where(here, k + S, k + S - NK) * 128
            to = gl.where(here, row, row2)
            whose = gl.where(here, expert, expert2)
            mbarrier.expect(bar, size, pred=pred)
            _ask(w_desc, v_desc, to, column, whose, bar, ring.index(2 * slot), pred, E)
            _ask(w_desc, v_desc, to + F, column, whose, bar, ring.index(2 * slot + 1), pred, E)
            gate += g * gl.expand_dims(s * gate_scale, 0)
            up += u * gl.expand_dims(s * up_scale, 0)
            done += 1
        weight = gl.load(weights + choice1, mask=(i1 < rows) & routed, other=0.0)
        open_ = gl.load(gates + start + i1, mask=(i1 < rows) & (expert >= E), other=0.0)
        weight = gl.where(routed, weight, open_)
        out = gate / (1.0 + gl.exp(-gate)) * up * gl.expand_dims(weight, 0)
        out = gl.convert_layout(out.to(act.dtype.element_ty), flat)
        i2 = gl.arange(0, TILE, gl.SliceLayout(0, flat))
        choice2 = gl.load(lists + expert * cap + start + i2, mask=(i2 < rows) & routed, other=0)
        choice2 = gl.where(routed, choice2, T * TOP + start + i2)
        m = block * 64 + gl.arange(0, 64, gl.SliceLayout(1, flat))
        to_act = act + gl.expand_dims(choice2, 0) * F + gl.expand_dims(m, 1)
        gl.store(to_act, out, mask=gl.expand_dims(i2 < rows, 0) & (gl.expand_dims(m, 1) < F))
        unit = following
        expert = expert2
        start = start2
        rows = rows2
        block = block2
        row = row2


@gluon.jit
def _down(
    w_desc, v_desc, act, scale, v_scale, tasks, counts, lists, y, T, cap,
    E: gl.constexpr, TOP: gl.constexpr, H: gl.constexpr, F: gl.constexpr, TILE: gl.constexpr,
    BM: gl.constexpr, CHUNK: gl.constexpr, S: gl.constexpr, PDL: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """CHUNK blocks of BM output rows; the task's activations are quantised here, per 128."""
    NK: gl.constexpr = F // 128
    STEPS: gl.constexpr = NK * CHUNK
    BLOCKS: gl.constexpr = H // (BM * CHUNK)
    size: gl.constexpr = BM * 128
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, TILE, 32]
    )
    load_l: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([2, 1], [32, 1], [1, WARPS], [0, 1])
    x_kind: gl.constexpr = gl.NVMMASharedLayout(128, 8)
    ring = gl.allocate_shared_memory(gl.float8e4nv, [S, BM, 128], w_desc.layout)
    held = gl.allocate_shared_memory(gl.float8e4nv, [NK, TILE, 128], x_kind)
    held_scale = gl.allocate_shared_memory(
        gl.float32, [NK, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    bars = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(S):
        mbarrier.init(bars.index(i), count=1)
    if PDL:
        # the kernel before lets this one start only after its own wait: the tasks are final
        gdc_launch_dependents()
    step = gl.num_programs(0)
    unit = gl.program_id(0)
    units = (gl.load(counts + E) + (T + TILE - 1) // TILE) * BLOCKS
    if unit >= units:
        return
    expert, start, rows, block = _unit(tasks, counts, unit, units, T, E, TILE, BLOCKS)
    row = gl.where(expert < E, expert * H, 0) + block * (BM * CHUNK)
    for i in gl.static_range(S):
        mbarrier.expect(bars.index(i), size)
        _ask(w_desc, v_desc, row + i // NK * BM, i % NK * 128, expert, bars.index(i),
             ring.index(i), True, E)  # fmt: skip
    if PDL:
        gdc_wait()
    done = 0
    while unit < units:
        routed = expert < E
        following = unit + step
        more = following < units
        expert2, start2, rows2, block2 = _unit(tasks, counts, following, units, T, E, TILE, BLOCKS)
        row2 = gl.where(expert2 < E, expert2 * H, 0) + block2 * (BM * CHUNK)
        i0 = gl.arange(0, TILE, gl.SliceLayout(1, load_l))
        choice0 = gl.load(lists + expert * cap + start + i0, mask=(i0 < rows) & routed, other=0)
        choice0 = gl.where(routed, choice0, T * TOP + start + i0)
        k0 = gl.arange(0, 128, gl.SliceLayout(0, load_l))
        at = act + gl.expand_dims(choice0, 1) * F + gl.expand_dims(k0, 0)
        live = gl.expand_dims(i0 < rows, 1) & (gl.expand_dims(k0, 0) < F)
        values = ()
        for group in gl.static_range(NK):  # all on their way before the first is used
            values = values + (gl.load(at + group * 128, mask=live, other=0.0),)  # noqa: RUF005
        for group in gl.static_range(NK):
            value = values[group].to(gl.float32)
            largest = gl.max(gl.abs(value), axis=1)
            s0 = gl.maximum(largest, 1e-12) / 448.0
            held.index(group).store((value / gl.expand_dims(s0, 1)).to(gl.float8e4nv))
            held_scale.index(group).store(s0)
        fence_async_shared()
        w_scale = gl.where(routed, scale + expert.to(gl.int64) * (H // 128 * NK), v_scale)
        i2 = gl.arange(0, TILE, gl.SliceLayout(0, flat))
        choice2 = gl.load(lists + expert * cap + start + i2, mask=(i2 < rows) & routed, other=0)
        choice2 = gl.where(routed, choice2, T * TOP + start + i2)
        for c in range(CHUNK):
            acc = gl.zeros([BM, TILE], gl.float32, mma)
            for k in range(NK):
                slot = done % S
                bar = bars.index(slot)
                j = c * NK + k + S
                s = held_scale.index(k).load(gl.SliceLayout(0, mma))
                s *= gl.load(w_scale + (block * CHUNK + c) * BM // 128 * NK + k)
                mbarrier.wait(bar, (done // S) & 1)
                part = warpgroup_mma(
                    ring.index(slot), held.index(k).permute([1, 0]),
                    gl.zeros([BM, TILE], gl.float32, mma), use_acc=False, is_async=True,
                )  # fmt: skip
                part = warpgroup_mma_wait(0, deps=(part,))
                here = j < STEPS
                pred = here | more
                j = gl.where(here, j, j - STEPS)
                to = gl.where(here, row, row2) + j // NK * BM
                mbarrier.expect(bar, size, pred=pred)
                _ask(w_desc, v_desc, to, j % NK * 128, gl.where(here, expert, expert2), bar,
                     ring.index(slot), pred, E)  # fmt: skip
                acc += part * gl.expand_dims(s, 0)
                done += 1
            out = gl.convert_layout(acc.to(y.dtype.element_ty), flat)
            m = (block * CHUNK + c) * BM + gl.arange(0, BM, gl.SliceLayout(1, flat))
            to_y = y + gl.expand_dims(choice2, 0) * H + gl.expand_dims(m, 1)
            gl.store(to_y, out, mask=gl.expand_dims(i2 < rows, 0) & (gl.expand_dims(m, 1) < H))
        unit = following
        expert = expert2
        start = start2
        rows = rows2
        block = block2
        row = row2


def experts(
    x: Tensor,
    x_scale: Tensor,
    stacked: tuple[Tensor, Tensor, Tensor, Tensor],
    shared: tuple[Tensor, Tensor, Tensor, Tensor],
    route: dict[str, Any],
    act: Tensor,
    y: Tensor,
    *,
    top_k: int,
    pdl: bool = False,
    config: dict[str, int] | None = None,
) -> Tensor:
    """Outputs of every choice, weighted, before they are added up.

    Args:
        x: (T, H) e4m3 normalised activations.
        x_scale: (T, H / 128) their scales.
        stacked: gate_up (E, 2F, H) e4m3, its scales (E, 2F / 128, H / 128), down (E, H, F), its
            scales.
        shared: the same without the leading axis.
        route: from ``triton_route.route_tasks``.
        act: (T * top_k + T, F) BF16 workspace; rows by choice, the shared expert's last.
        y: (T * top_k + T, H) fp32 output, in the same order.
        top_k: experts per token.
        pdl: launch with programmatic stream serialization.
        config: ``S``/``SD`` tiles in flight, ``P``/``PD`` programs, ``BM`` rows and ``CHUNK``
            blocks of down.
    """
    w1, s1, w2, s2 = stacked
    v1, u1, v2, u2 = shared
    (e, h, f), t = w2.shape, x.shape[0]
    # measured on one H200: (4, 264) and (3, 396) for S, P differ by less than the runs do
    c = {"S": 4, "P": 264, "SD": 4, "PD": 396, "BM": 128, "CHUNK": 2 if t <= 64 else 4}
    c |= config or {}
    tile, cap = route["tile"], route["lists"].shape[1]
    shape = {"E": e, "TOP": top_k, "H": h, "F": f, "TILE": tile, "PDL": pdl, "WARPS": 4}
    launch = {"num_warps": 4, "launch_pdl": pdl}
    _gate_up[(c["P"],)](
        tiles(w1.view(-1, h), 64), tiles(v1, 64), x, x_scale, s1, u1, route["tasks"],
        route["counts"], route["lists"], route["weights"], route["gates"], act, t, cap, S=c["S"],
        **shape, **launch,
    )  # fmt: skip
    _down[(c["PD"],)](
        tiles(w2.view(-1, f), c["BM"]), tiles(v2, c["BM"]), act, s2, u2, route["tasks"],
        route["counts"], route["lists"], y, t, cap, BM=c["BM"], CHUNK=c["CHUNK"], S=c["SD"],
        **shape, **launch,
    )  # fmt: skip
    return y


def tile_for(tokens: int) -> int:
    """Tokens of a task: the narrow side of the product, by the mean load of an expert."""
    return 8 if tokens <= 128 else 16
