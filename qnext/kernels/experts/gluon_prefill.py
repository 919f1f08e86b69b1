"""The grouped FP8 products of prefill on Hopper, warp-specialised in Gluon.

A program stays on its multiprocessor and walks over tiles of 128 rows and 2 x 128 columns. Four
warps copy (the rows gathered, the weights as they lie), two warpgroups multiply 64 rows each.
Reading tiles from L2 is what limits it: so ``_grouped_down``, whose weights of one expert fit in
shared memory, keeps them there for all tiles of the expert.
Every product of 128 channels leaves the tensor core, is scaled by its block's two scales and added
in fp32 registers; while one warpgroup does that, the other one multiplies, and while both write
their rows, the copies of the next tile are on their way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from qnext.kernels.experts.triton_prefill import Routing
from qnext.kernels.hopper import barrier, load_rows
from qnext.kernels.norm.triton_prefill import FP8

ROWS = 128
#: Stages of rows and weights of gate and up, and of the rows of down.
STAGES = (4, 4)
#: Registers of a thread of the second multiplying group and of a copying one; the first
#: multiplying group gets what is left of 512.
REGISTERS = (216, 80)


@gluon.jit
def _copy(
    x, tokens, tiles, w, shared, a, b0, b1, full, empty, total,
    E: gl.constexpr, H: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Brings 128 channels of rows and weights into the next free stage, again and again."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    i = gl.arange(0, 128, gl.SliceLayout(1, layout))
    c = gl.arange(0, 128, gl.SliceLayout(0, layout))
    step = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        line = tiles + t // (F // 128) * 4
        expert = gl.load(line)
        row = gl.load(tokens + gl.load(line + 1) + gl.minimum(i, gl.load(line + 2) - 1))
        weight = gl.where(expert == E, shared, w + expert.to(gl.int64) * (2 * F * H))
        a_at = x + row.to(gl.int64)[:, None] * H + c[None, :]
        b_at = weight + (t % (F // 128) * 128 + i)[:, None] * H + c[None, :]
        for k in range(H // 128):
            s = step % STAGES
            mbarrier.wait(empty.index(s), (step // STAGES & 1) ^ 1)
            load_rows(a.index(s), a_at + k * 128)
            load_rows(b0.index(s), b_at + k * 128)
            load_rows(b1.index(s), b_at + F * H + k * 128)
            async_copy.mbarrier_arrive(full.index(s), increment_count=False)
            step += 1


@gluon.jit
def _multiply(
    x_scales, tokens, tiles, w_scale, shared_scale, act, act_scales, a, b0, b1, full, empty, total,
    T, R, WHICH: gl.constexpr, E: gl.constexpr, H: gl.constexpr, F: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """64 rows of each tile, 128 channels of gate and of up; SwiGLU and FP8 at the end."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]
    )
    wide: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    KB: gl.constexpr = H // 128
    NB: gl.constexpr = F // 128
    i = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma))
    j = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, wide))
    c = gl.arange(0, 128, gl.SliceLayout(0, wide))
    product = gl.zeros([64, 128], gl.float32, mma)
    step = 0
    each = gl.num_programs(0)
    line = tiles + gl.program_id(0) // NB * 4
    token = gl.load(tokens + gl.load(line + 1) + gl.minimum(i, gl.load(line + 2) - 1))
    scale = gl.load(x_scales + token)
    for t in range(gl.program_id(0), total, each):
        line = tiles + t // NB * 4
        expert = gl.load(line)
        first = gl.load(line + 1)
        count = gl.load(line + 2)
        n = t % NB
        block = gl.where(expert == E, shared_scale, w_scale + expert * (2 * NB * KB)) + n * KB
        gate = gl.zeros([64, 128], gl.float32, mma)
        up = gl.zeros([64, 128], gl.float32, mma)
        gate_unit = gl.load(block)
        up_unit = gl.load(block + NB * KB)
        for k in range(KB):
            after = gl.minimum(k + 1, KB - 1)
            next_scale = gl.load(x_scales + after * T + token)
            next_gate = gl.load(block + after)
            next_up = gl.load(block + NB * KB + after)
            s = step % STAGES
            mbarrier.wait(full.index(s), step // STAGES & 1)
            rows = a.index(s).slice(WHICH * 64, 64, 0)
            product = warpgroup_mma(
                rows, b0.index(s).permute((1, 0)), product, use_acc=False, is_async=True
            )
            product = warpgroup_mma_wait(0, deps=[product])
            gate += product * (scale * gate_unit)[:, None]
            product = warpgroup_mma(
                rows, b1.index(s).permute((1, 0)), product, use_acc=False, is_async=True
            )
            product = warpgroup_mma_wait(0, deps=[product])
            barrier()
            mbarrier.arrive(empty.index(s), count=1)
            up += product * (scale * up_unit)[:, None]
            scale = next_scale
            gate_unit = next_gate
            up_unit = next_up
            step += 1
        # the next tile's rows and first scales arrive while this one is written
        line = tiles + gl.where(t + each < total, t + each, t) // NB * 4
        token = gl.load(tokens + gl.load(line + 1) + gl.minimum(i, gl.load(line + 2) - 1))
        scale = gl.load(x_scales + token)
        y = gate * up / (1.0 + gl.exp(-gate))
        unit = gl.maximum(gl.max(gl.abs(y), 1), 1e-10) / 448.0
        small = gl.convert_layout((y * (1.0 / unit)[:, None]).to(gl.float8e4nv), wide)
        at = act + (first + j).to(gl.int64)[:, None] * F + n * 128 + c[None, :]
        gl.store(at, small, mask=(j < count)[:, None])
        gl.store(act_scales + n * R + first + i, unit, mask=i < count)


@gluon.jit
def _grouped_gate_up(
    x, x_scales, tokens, tiles, w, w_scale, shared, shared_scale, act, act_scales, T, R,
    E: gl.constexpr, H: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Tiles one after the other over all programs, the columns of a row tile side by side."""
    tile: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    a = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], tile)
    b0 = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], tile)
    b1 = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], tile)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=128)
        mbarrier.init(empty.index(s), count=2)
    barrier()
    total = gl.load(tiles + 3) * (F // 128)
    gl.warp_specialize(
        [
            (_multiply, (x_scales, tokens, tiles, w_scale, shared_scale, act, act_scales, a, b0,
                         b1, full, empty, total, T, R, 0, E, H, F, STAGES)),
            (_multiply, (x_scales, tokens, tiles, w_scale, shared_scale, act, act_scales, a, b0,
                         b1, full, empty, total, T, R, 1, E, H, F, STAGES)),
            (_copy, (x, tokens, tiles, w, shared, a, b0, b1, full, empty, total, E, H, F, STAGES)),
        ],
        [4, 4],
        [REGISTERS[0], REGISTERS[1]],
    )  # fmt: skip


@gluon.jit
def _copy_down(
    act, tiles, w, shared, a, b, full, empty, b_full, b_empty, start, stop, n,
    E: gl.constexpr, H: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Rows of every tile; an expert's 256 x F weights only when the expert changes."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    i = gl.arange(0, 128, gl.SliceLayout(1, layout))
    c = gl.arange(0, 128, gl.SliceLayout(0, layout))
    step = 0
    epoch = 0
    before = -1
    for t in range(start, stop):
        line = tiles + t * 4
        expert = gl.load(line)
        row = gl.load(line + 1) + gl.minimum(i, gl.load(line + 2) - 1)
        a_at = act + row.to(gl.int64)[:, None] * F + c[None, :]
        weight = gl.where(expert == E, shared, w + expert.to(gl.int64) * (H * F))
        b_at = weight + (n * 256 + i)[:, None] * F + c[None, :]
        for k in range(F // 128):
            if expert != before:
                mbarrier.wait(b_empty.index(k), (epoch & 1) ^ 1)
                load_rows(b.index(2 * k), b_at + k * 128)
                load_rows(b.index(2 * k + 1), b_at + 128 * F + k * 128)
                async_copy.mbarrier_arrive(b_full.index(k), increment_count=False)
            s = (step + k) % STAGES
            mbarrier.wait(empty.index(s), ((step + k) // STAGES & 1) ^ 1)
            load_rows(a.index(s), a_at + k * 128)
            async_copy.mbarrier_arrive(full.index(s), increment_count=False)
        step += F // 128
        epoch += gl.where(expert != before, 1, 0)
        before = expert


@gluon.jit
def _multiply_down(
    act_scales, tiles, w_scale, shared_scale, y, a, b, full, empty, b_full, b_empty, start, stop,
    n, R, WHICH: gl.constexpr, E: gl.constexpr, H: gl.constexpr, F: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """64 rows of each tile, 256 columns; weights are let go after an expert's last tile."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]
    )
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    KB: gl.constexpr = F // 128
    i = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma))
    j = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, wide))
    c = gl.arange(0, 128, gl.SliceLayout(0, wide))
    product = gl.zeros([64, 128], gl.float32, mma)
    step = 0
    epoch = -1
    before = -1
    line = tiles + start * 4
    row = gl.load(line + 1) + gl.minimum(i, gl.load(line + 2) - 1)
    scale = gl.load(act_scales + row)
    for t in range(start, stop):
        line = tiles + t * 4
        expert = gl.load(line)
        first = gl.load(line + 1)
        count = gl.load(line + 2)
        line += gl.where(t + 1 < stop, 4, 0)
        leave = (gl.load(line) != expert) | (t + 1 == stop)
        epoch += gl.where(expert != before, 1, 0)
        before = expert
        block = gl.where(expert == E, shared_scale, w_scale + expert * (H // 128 * KB))
        block += n * 2 * KB
        left = gl.zeros([64, 128], gl.float32, mma)
        right = gl.zeros([64, 128], gl.float32, mma)
        left_unit = gl.load(block)
        right_unit = gl.load(block + KB)
        for k in range(KB):
            after = gl.minimum(k + 1, KB - 1)
            next_scale = gl.load(act_scales + after * R + row)
            next_left = gl.load(block + after)
            next_right = gl.load(block + KB + after)
            s = step % STAGES
            mbarrier.wait(b_full.index(k), epoch & 1)
            mbarrier.wait(full.index(s), step // STAGES & 1)
            rows = a.index(s).slice(WHICH * 64, 64, 0)
            product = warpgroup_mma(
                rows, b.index(2 * k).permute((1, 0)), product, use_acc=False, is_async=True
            )
            product = warpgroup_mma_wait(0, deps=[product])
            left += product * (scale * left_unit)[:, None]
            product = warpgroup_mma(
                rows, b.index(2 * k + 1).permute((1, 0)), product, use_acc=False, is_async=True
            )
            product = warpgroup_mma_wait(0, deps=[product])
            barrier()
            mbarrier.arrive(empty.index(s), count=1)
            mbarrier.arrive(b_empty.index(k), count=1, pred=leave)
            right += product * (scale * right_unit)[:, None]
            scale = next_scale
            left_unit = next_left
            right_unit = next_right
            step += 1
        # the next tile's first scales arrive while this one is written
        row = gl.load(line + 1) + gl.minimum(i, gl.load(line + 2) - 1)
        scale = gl.load(act_scales + row)
        live = (j < count)[:, None]
        at = y + (first + j).to(gl.int64)[:, None] * H + n * 256 + c[None, :]
        gl.store(at, gl.convert_layout(left.to(y.dtype.element_ty), wide), mask=live)
        gl.store(at + 128, gl.convert_layout(right.to(y.dtype.element_ty), wide), mask=live)


@gluon.jit
def _grouped_down(
    act, act_scales, tiles, w, w_scale, shared, shared_scale, y, R,
    E: gl.constexpr, H: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """256 columns of a stretch of tiles; the programs of one stretch share its rows in L2."""
    tile: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    KB: gl.constexpr = F // 128
    a = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], tile)
    b = gl.allocate_shared_memory(gl.float8e4nv, [2 * KB, 128, 128], tile)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    b_full = gl.allocate_shared_memory(gl.int64, [KB, 1], mbarrier.MBarrierLayout())
    b_empty = gl.allocate_shared_memory(gl.int64, [KB, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=128)
        mbarrier.init(empty.index(s), count=2)
    for s in gl.static_range(KB):
        mbarrier.init(b_full.index(s), count=128)
        mbarrier.init(b_empty.index(s), count=2)
    barrier()
    NT: gl.constexpr = H // 256
    n = gl.program_id(0) % NT
    part = gl.program_id(0) // NT
    parts = gl.num_programs(0) // NT
    total = gl.load(tiles + 3)
    start = part * total // parts
    stop = (part + 1) * total // parts
    gl.warp_specialize(
        [
            (_multiply_down, (act_scales, tiles, w_scale, shared_scale, y, a, b, full, empty,
                              b_full, b_empty, start, stop, n, R, 0, E, H, F, STAGES)),
            (_multiply_down, (act_scales, tiles, w_scale, shared_scale, y, a, b, full, empty,
                              b_full, b_empty, start, stop, n, R, 1, E, H, F, STAGES)),
            (_copy_down, (act, tiles, w, shared, a, b, full, empty, b_full, b_empty, start, stop,
                          n, E, H, F, STAGES)),
        ],
        [4, 4],
        [REGISTERS[0], REGISTERS[1]],
    )  # fmt: skip


def experts_rows(
    x: Tensor,
    scales: Tensor,
    routing: Routing,
    experts: tuple[Tensor, Tensor, Tensor, Tensor],
    shared: tuple[Tensor, Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    stages: tuple[int, int] = STAGES,
) -> Tensor:
    """``qnext.kernels.experts.triton_prefill.experts_rows``; tiles of ``ROWS`` rows."""
    w1, s1, w2, s2 = experts
    v1, u1, v2, u2 = shared
    (count, hidden, inner), tokens = w2.shape, x.shape[0]
    rows, device = len(routing.tokens), x.device
    act = torch.empty(rows, inner, dtype=FP8, device=device)
    act_scales = torch.empty(inner // 128, rows, dtype=torch.float32, device=device)
    y = torch.empty(rows, hidden, dtype=dtype, device=device)
    programs = torch.cuda.get_device_properties(device).multi_processor_count if x.is_cuda else 132
    common = {"E": count, "H": hidden, "F": inner, "REGISTERS": REGISTERS, "num_warps": 4}
    _grouped_gate_up[(programs,)](
        x, scales, routing.tokens, routing.tiles, w1, s1, v1, u1, act, act_scales, tokens, rows,
        STAGES=stages[0], **common,
    )  # fmt: skip
    _grouped_down[(programs // (hidden // 256) * (hidden // 256),)](
        act, act_scales, routing.tiles, w2, s2, v2, u2, y, rows, STAGES=stages[1], **common
    )
    return y
