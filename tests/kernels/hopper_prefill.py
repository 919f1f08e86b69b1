"""Compile the prefill kernels at the 80B shapes for sm_90 without a GPU, one JSON line each.

Run as a script with ``TRITON_INTERPRET`` unset; launches become compilations.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hopper_delta import compile_instead_of_launching

BF16, FP8, I32 = torch.bfloat16, torch.float8_e4m3fn, torch.int32
H, F, E, TOP, HEADS, HKV, D = 2048, 512, 512, 10, 16, 2, 256


def matrix(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
    return torch.empty((1, *shape[1:]), dtype=FP8).expand(shape), torch.empty(blocks)


def moe() -> None:
    from qnext.kernels.experts import gluon_prefill
    from qnext.kernels.experts import triton_prefill as prefill

    t = 256
    experts = (*matrix(E, 2 * F, H), *matrix(E, H, F))
    shared = (*matrix(2 * F, H), *matrix(H, F))
    x, scales = torch.empty(t, H, dtype=FP8), torch.empty(H // 128, t)
    routing = prefill.route_sorted(torch.empty(t, E + 1, dtype=BF16), TOP, True, 128)
    prefill.experts_rows(x, scales, routing, experts, shared, BF16)
    y = gluon_prefill.experts_rows(x, scales, routing, experts, shared, BF16)
    prefill.combine(y, routing, torch.empty(t, H, dtype=BF16), torch.empty(H, dtype=BF16), 1e-6)


def norms() -> None:
    from qnext.kernels.causal_conv import triton_heads
    from qnext.kernels.norm import triton_prefill

    x, w = torch.empty(256, H, dtype=BF16), torch.empty(H, dtype=BF16)
    triton_prefill.norm_quantised(x, w, 1e-6, x)
    o, z = torch.empty(256, 32, 128, dtype=BF16), torch.empty(256, 12288, dtype=BF16)
    triton_prefill.gated_norm_quantised(o, z[:, 8192:], w[:128], 1e-6)
    cu, gates = torch.tensor([0, 256], dtype=I32), torch.empty(32)
    triton_heads.delta_inputs(
        z[:, :8192], torch.empty(256, 64, dtype=BF16), torch.empty(8192, 4, dtype=BF16), gates,
        gates, cu, torch.empty(1, 8192, 3, dtype=BF16), key_heads=16, value_heads=32,
    )  # fmt: skip


def attention() -> None:
    from qnext.kernels.attention import triton_prefill

    t, w = 256, torch.empty(D, dtype=BF16)
    qkv = torch.empty(t, 9216, dtype=BF16)
    cache = torch.empty(32, 16, HKV, D, dtype=BF16)
    q = triton_prefill.store_qkv(
        qkv, w, w, torch.empty(t, 64), torch.zeros(t, dtype=torch.int64), cache, cache, HEADS, 1e-6
    )
    lens = torch.zeros(1, dtype=I32)
    out = triton_prefill.attend_paged(
        q, cache, cache, torch.zeros(1, 16, dtype=I32), lens, torch.tensor([0, t], dtype=I32),
        0.0625, t, with_lse=True,
    )  # fmt: skip
    triton_prefill.merge(out, out)
    triton_prefill.merge(out, out, qkv, quantised=True)
    triton_prefill.merge(out, None, qkv, quantised=True)


def delta() -> None:
    from qnext.kernels.gated_delta import gluon_chunk

    q, v = torch.empty(256, 16, 128, dtype=BF16), torch.empty(256, 32, 128, dtype=BF16)
    gates, state = torch.empty(256, 32), torch.empty(1, 32, 128, 128)
    cu = torch.tensor([0, 256], dtype=I32)
    gluon_chunk.chunk_gated_delta_rule(q, q, v, gates, gates, cu, state)


def main() -> None:
    compile_instead_of_launching()
    moe()
    norms()
    attention()
    delta()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
