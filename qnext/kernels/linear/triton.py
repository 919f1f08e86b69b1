"""Triton linear for 1..64 rows: a register GEMV and a tensor-core kernel.

``_gemv`` (1..4 rows) keeps whole weight rows of a program in registers: a warp reads 512 bytes of
one row per instruction, products are summed with shuffles only. ``_skinny`` (2..64 rows) puts the
weights on the M side of ``tl.dot`` and the tokens on its narrow N side.

``_gemv`` starts its weight traffic before ``gdc_wait`` (programmatic dependent launch), so that it
overlaps the end of the kernel before, and applies the norm's scale to the finished sums, off the
critical path; ``_skinny`` reads rows that a small kernel normalised. A second BF16 matrix (``tail``, DeltaNet's ``in_proj_ba``) may follow the first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

GEMV_ROWS = 4


@triton.jit
def prefetch_l2(pointer, size):
    """One thread asks the copy engine to bring ``size`` bytes at ``pointer`` into L2."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 t;
        mov.u32 t, %tid.x;
        setp.eq.u32 p, t, 0;
        @p cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [pointer.to(tl.int64), size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def k_offsets(KC: tl.constexpr, KB: tl.constexpr):
    """Columns of a [KB, 1, KC, 128] tile: one warp covers KB*128 contiguous weights.

    Triton spreads threads over the last axis, then the first: lanes lie along 128 and KB, warps
    along the rows, KC stays in registers.
    """
    kb = tl.arange(0, KB)[:, None, None, None]
    kc = tl.arange(0, KC)[None, None, :, None]
    ki = tl.arange(0, 128)[None, None, None, :]
    return kc * (KB * 128) + kb * 128 + ki


@triton.jit
def load_scales(scale, row_block, k0, K: tl.constexpr, KC: tl.constexpr, KB: tl.constexpr):
    """Block scales of columns k0.. as a [KB, 1, KC, 1] tile."""
    kb = tl.arange(0, KB)[:, None, None, None]
    kc = tl.arange(0, KC)[None, None, :, None]
    return tl.load(scale + row_block * (K // 128) + k0 // 128 + kc * KB + kb).to(tl.float32)


@triton.jit
def row_sums(weight, x):
    """Sum of weight [KB, BN, KC, 128] times x [KB, 1, KC, 128] over columns: [BN]."""
    products = tl.sum(weight.to(tl.float32) * x, axis=2)
    return tl.sum(tl.sum(products, axis=2), axis=0)


@triton.jit
def norm_row(x, norm, y, eps, H: tl.constexpr, P: tl.constexpr):
    """Zero-centred RMSNorm of the row x [H] to y (spec 2.1); P: power of two not below H."""
    i = tl.arange(0, P)
    value = tl.load(x + i, mask=i < H, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / H + eps)
    value *= 1.0 + tl.load(norm + i, mask=i < H, other=0.0).to(tl.float32)
    tl.store(y + i, value.to(y.dtype.element_ty), mask=i < H)


@triton.jit
def _norm_rows(x, norm, y, eps, H: tl.constexpr, P: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0)
    norm_row(x + t * H, norm, y + t * H, eps, H, P)


@triton.jit
def _gemv_rows(
    x, norm, w, scale, res, y, pmax, pidx, first, N, y_offset, y_stride, eps, pid,
    T: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, KC: tl.constexpr, KB: tl.constexpr,
    FP8: tl.constexpr, NORM: tl.constexpr, RES: tl.constexpr, ARGMAX: tl.constexpr,
    FETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    CH: tl.constexpr = KC * KB * 128
    rows = first + tl.arange(0, BN)
    safe = tl.minimum(rows, N - 1).to(tl.int64)[None, :, None, None]
    columns = k_offsets(KC, KB)
    if PDL:
        if FETCH:
            size = tl.minimum(N - first, BN) * (K * w.dtype.element_ty.primitive_bitwidth // 8)
            prefetch_l2(w + first.to(tl.int64) * K, size)
        gdc_wait()
    for t in tl.static_range(T):
        acc = tl.zeros([BN], tl.float32)
        square = tl.zeros([KB, 1, KC, 128], tl.float32)
        for c in tl.static_range(K // CH):
            # x is loaded before the weights: Triton gives their product the layout of the load
            # that comes last, and only the weights must not change layout.
            xv = tl.load(x + t * K + c * CH + columns).to(tl.float32)
            if NORM:
                square += xv * xv
                xv *= 1.0 + tl.load(norm + c * CH + columns).to(tl.float32)
            if FP8:
                xv *= load_scales(scale, first // 128, c * CH, K, KC, KB)
            wc = tl.load(w + safe * K + c * CH + columns, eviction_policy="evict_first")
            acc += row_sums(wc, xv)
        if NORM:
            total = tl.sum(tl.reshape(square, [KB * KC * 128]), axis=0)
            acc *= tl.rsqrt(total / K + eps)
        at = t * y_stride + y_offset + rows
        if RES:
            acc += tl.load(res + at, mask=rows < N, other=0.0).to(tl.float32)
        out = acc.to(y.dtype.element_ty)
        tl.store(y + at, out, mask=rows < N)
        if ARGMAX:
            store_best(out.to(tl.float32), rows, N, pmax, pidx, t * tl.num_programs(0) + pid)


@triton.jit
def store_best(value, rows, N, pmax, pidx, at):
    """Largest of ``value`` [BN] and its lowest row go to ``pmax[at]``, ``pidx[at]``."""
    value = tl.where(rows < N, value, float("-inf"))
    best = tl.max(value, axis=0)
    tl.store(pmax + at, best)
    tl.store(pidx + at, tl.min(tl.where(value == best, rows, 2147483647), axis=0))


@triton.jit
def _gemv(
    x, norm, w, scale, tail, res, y, pmax, pidx, N, N2, y_stride, eps,
    T: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BN2: tl.constexpr,
    KC: tl.constexpr, KB: tl.constexpr, KC2: tl.constexpr, FP8: tl.constexpr,
    NORM: tl.constexpr, RES: tl.constexpr, TAIL: tl.constexpr, ARGMAX: tl.constexpr,
    FETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    tiles2 = tl.cdiv(N2, BN2) if TAIL else 0
    if TAIL and pid < tiles2:
        _gemv_rows(x, norm, tail, scale, res, y, pmax, pidx, pid * BN2, N2, N, y_stride, eps,
                   pid, T, K, BN2, KC2, 2, False, NORM, RES, False, FETCH, PDL)  # fmt: skip
    else:
        _gemv_rows(x, norm, w, scale, res, y, pmax, pidx, (pid - tiles2) * BN, N, 0, y_stride,
                   eps, pid, T, K, BN, KC, KB, FP8, NORM, RES, ARGMAX, FETCH, PDL)  # fmt: skip


@triton.jit
def _skinny(
    x, w, scale, res, y, pmax, pidx, N, y_offset, y_stride, T,
    TP: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, KS: tl.constexpr,
    FP8: tl.constexpr, RES: tl.constexpr, ARGMAX: tl.constexpr,
    STAGES: tl.constexpr, F32: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """KS slices of K side by side (a batched dot, one warp group each), summed at the end."""
    if PDL:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    first = pid * BM
    rows = first + tl.arange(0, BM)
    safe = tl.minimum(rows, N - 1).to(tl.int64)
    ki = tl.arange(0, 128)
    ks = tl.arange(0, KS)
    toks = tl.arange(0, TP)
    if PDL:
        gdc_wait()
    wide: tl.constexpr = tl.float32 if F32 else x.dtype.element_ty
    acc = tl.zeros([KS, BM, TP], tl.float32)
    w_at = w + safe[None, :, None] * K + ks[:, None, None] * 128 + ki[None, None, :]
    x_at = x + toks[None, None, :] * K + ks[:, None, None] * 128 + ki[None, :, None]
    live = (toks < T)[None, None, :]
    for k in tl.range(0, K, KS * 128, num_stages=STAGES):
        wt = tl.load(w_at + k, eviction_policy="evict_first")
        xt = tl.load(x_at + k, mask=live, other=0.0)
        if KS == 1:
            flat = tl.reshape(xt, [128, TP]).to(wide)
            part = tl.dot(tl.reshape(wt, [BM, 128]).to(wide), flat)[None, :, :]
        else:
            part = tl.dot(wt.to(wide), xt.to(wide))
        if FP8:
            s = tl.load(scale + (first // 128) * (K // 128) + k // 128 + ks).to(tl.float32)
            acc += part * s[:, None, None]
        else:
            acc += part
    out = tl.sum(acc, axis=0)
    at = toks[None, :] * y_stride + y_offset + rows[:, None]
    keep = (rows < N)[:, None] & (toks < T)[None, :]
    if RES:
        out += tl.load(res + at, mask=keep, other=0.0).to(tl.float32)
    out = out.to(y.dtype.element_ty)
    tl.store(y + at, out, mask=keep)
    if ARGMAX:
        value = tl.where(keep, out.to(tl.float32), float("-inf"))
        best = tl.max(value, axis=0)
        index = tl.min(tl.where(value == best[None, :], rows[:, None], 2147483647), axis=0)
        tl.store(pmax + toks * tl.num_programs(0) + pid, best, mask=toks < T)
        tl.store(pidx + toks * tl.num_programs(0) + pid, index, mask=toks < T)


def _power_of_two(n: int) -> int:
    return n & -n


def covers(weight: Tensor) -> bool:
    """Whether the kernels take a weight of this dtype and width."""
    if weight.dtype == torch.float8_e4m3fn:
        return weight.shape[1] % 512 == 0
    return weight.shape[1] % 256 == 0


def gemv_config(n: int, k: int, fp8: bool) -> tuple[int, int, int]:
    """(rows per program, K chunks held in registers, warps); FP8 measured on one H200."""
    if fp8 and (n >= 8192, k) == (True, 2048):
        return 8, 4, 4
    if fp8 and (n, k) == (2048, 4096):
        return 4, 8, 4
    unit = 512 if fp8 else 256
    chunks = min(_power_of_two(k // unit), 8)
    rows = 16 if n * k >= 1 << 24 else 8
    while rows * chunks * unit * (1 if fp8 else 2) > 1 << 15:
        if chunks > 4:
            chunks //= 2
        else:
            rows //= 2
    return rows, chunks, 4


def skinny_config(n: int, k: int, fp8: bool, tokens: int = 16) -> tuple[int, int, int, int]:
    """(rows per program, K slices, warps, stages) for one weight shape."""
    if tokens > 16:
        return 64, 1, 4, 3
    if n <= 1024 and k % 1024 == 0:
        return 16, 8, 8, 2
    if (fp8 or n <= 4096) and k % 512 == 0:
        return 16, 4, 4, 4
    return 64, 1, 4, 4


def norm_rows(x: Tensor, weight: Tensor, eps: float, out: Tensor, pdl: bool = False) -> Tensor:
    """Zero-centred RMSNorm of x (T, H) to ``out``."""
    tokens, width = x.shape
    _norm_rows[(tokens,)](
        x, weight, out, eps, H=width, P=triton.next_power_of_2(width), PDL=pdl, num_warps=8,
        launch_pdl=pdl,
    )  # fmt: skip
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    scale_inv: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    tail: Tensor | None = None,
    out: Tensor | None = None,
    normed: Tensor | None = None,
    best: tuple[Tensor, Tensor] | None = None,
    pdl: bool = False,
    config: tuple[int, ...] | None = None,
) -> Tensor:
    """``qnext.kernels.linear.linear`` for 1..64 rows, with the extras of a captured step.

    Args:
        x, weight, scale_inv, norm_weight, eps, residual: as in the contract.
        tail: (N2, K) BF16 matrix whose outputs follow those of ``weight`` in each row.
        out: (T, N + N2) written in place; may be ``residual``.
        normed: (T, K) workspace for the normalised rows, which ``_skinny`` reads.
        best: fp32 and int32 buffers (T, programs) for each program's largest output and its row.
        pdl: launch with programmatic stream serialization (inside a chain of such kernels).
        config: ``gemv_config`` (3 numbers) or ``skinny_config`` (4) to use instead.
    """
    t, k = x.shape
    n, n2 = weight.shape[0], 0 if tail is None else tail.shape[0]
    fp8 = scale_inv is not None
    y = x.new_empty(t, n + n2) if out is None else out
    if config is None:
        config = gemv_config(n, k, fp8) if t == 1 else skinny_config(n, k, fp8, t)
    norm, scale = x if norm_weight is None else norm_weight, x if scale_inv is None else scale_inv
    res, pmax, pidx = (x if residual is None else residual), *(best or (x, x))
    flags = {"FP8": fp8, "RES": residual is not None, "ARGMAX": best is not None, "PDL": pdl}
    if len(config) == 3:
        bn, kc, warps = config
        grid = (triton.cdiv(n, bn) + triton.cdiv(n2, 4),)
        # the requests of programs that wait for a free multiprocessor come too late to help:
        # the head, with 9,500 programs, was 10 % slower with them
        _gemv[grid](
            x, norm, weight, scale, x if tail is None else tail, res, y, pmax, pidx, n, n2, n + n2,
            eps, T=t, K=k, BN=bn, BN2=4, KC=kc, KB=4 if fp8 else 2,
            KC2=min(_power_of_two(k // 256), 8), TAIL=tail is not None,
            NORM=norm_weight is not None, FETCH=grid[0] <= 2048, num_warps=warps, launch_pdl=pdl,
            **flags,
        )  # fmt: skip
        return y
    if norm_weight is not None:
        # programs of _skinny share few rows: normalising in each cost more than this launch
        x = norm_rows(x, norm_weight, eps, torch.empty_like(x) if normed is None else normed, pdl)
    parts = [(weight, 0, flags, config)]
    if tail is not None:
        small = skinny_config(n2, k, False, t)
        parts.append((tail, n, flags | {"FP8": False, "ARGMAX": False}, small))
    for matrix, offset, options, (bm, ks, warps, stages) in parts:
        _skinny[(triton.cdiv(matrix.shape[0], bm),)](
            x, matrix, scale, res, y, pmax, pidx, matrix.shape[0], offset, n + n2, t,
            TP=max(8, triton.next_power_of_2(t)), K=k, BM=bm, KS=ks, STAGES=stages,
            F32=x.dtype == torch.float32, num_warps=warps, launch_pdl=pdl, **options,
        )  # fmt: skip
    return y
