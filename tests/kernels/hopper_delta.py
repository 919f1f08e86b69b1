"""Compile the delta rule, conv and norm kernels for sm_90 without a GPU, one JSON line each.

Run as a script with ``TRITON_INTERPRET`` unset; launches become compilations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from hopper import Hopper, resources
from triton.runtime import driver
from triton.runtime.jit import JITFunction


def compile_instead_of_launching() -> None:
    launch = JITFunction.run
    seen = set()

    def run(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash in seen:
            return kernel
        seen.add(kernel.hash)
        ptx = kernel.asm["ptx"]
        sys.stdout.write(json.dumps({
            "kernel": self.__name__, **resources(kernel.asm["cubin"]),
            "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps,
            "wgmma": ptx.count("wgmma.mma_async"), "mma": ptx.count("mma.sync"),
            "async": ptx.count("cp.async.c"), "wide": "v4.b32" in ptx,
        }) + "\n")  # fmt: skip
        return kernel

    driver.set_active(Hopper())
    JITFunction.run = run


def chunk(tokens: int, hk: int, hv: int, d: int, sequences: int = 1) -> None:
    from qnext.kernels.gated_delta import triton_chunk

    bf16 = torch.bfloat16
    q = torch.empty(tokens, hk, d, dtype=bf16, requires_grad=True)
    v = torch.empty(tokens, hv, d, dtype=bf16)
    g = torch.empty(tokens, hv)
    cu = torch.linspace(0, tokens, sequences + 1).int()
    state = torch.empty(sequences, hv, d, d)
    o, _ = triton_chunk.chunk_gated_delta_rule(q, q, v, g, g, cu, state)
    o.backward(v)


def decode(dtype: torch.dtype, pdl: bool) -> None:
    from qnext.kernels.gated_delta import triton_recurrent

    bf16 = torch.bfloat16
    wide = torch.empty(2, 12352, dtype=bf16)
    heads, slots = torch.empty(32, dtype=bf16), torch.zeros(2, dtype=torch.int32)
    triton_recurrent.fused_decode(
        wide[:, :8192], wide[:, 8192:12288], wide[:, 12288:12320], wide[:, 12320:],
        torch.empty(4, 8192, 3, dtype=bf16), torch.empty(8192, 4, dtype=bf16), heads, heads,
        torch.empty(128, dtype=bf16), torch.empty(4, 32, 128, 128, dtype=dtype), slots, 1e-6,
        pdl=pdl,
    )  # fmt: skip


def recurrent() -> None:
    from qnext.kernels.gated_delta import triton_recurrent

    q, v = torch.empty(4, 16, 128, dtype=torch.bfloat16), torch.empty(4, 32, 128).bfloat16()
    g, cu = torch.empty(4, 32), torch.tensor([0, 2, 4], dtype=torch.int32)
    state = torch.empty(2, 32, 128, 128)
    triton_recurrent.recurrent_gated_delta_rule(q, q, v, g, g, cu, state, True)


def small_ops() -> None:
    from qnext.kernels.causal_conv import triton as conv
    from qnext.kernels.norm import triton as norm

    bf16, cu = torch.bfloat16, torch.tensor([0, 128], dtype=torch.int32)
    x = torch.empty(128, 8192, dtype=bf16, requires_grad=True)
    y, _ = conv.causal_conv(x, torch.empty(8192, 4, dtype=bf16), cu)
    y.backward(y.detach())
    x, w = torch.empty(128, 2048, dtype=bf16, requires_grad=True), torch.empty(2048).bfloat16()
    y, total = norm.add_rms_norm(x, x, w, 1e-6)
    (y + total).backward(x.detach())
    x, w = torch.empty(512, 128, dtype=bf16, requires_grad=True), torch.empty(128).bfloat16()
    norm.gated_rms_norm(x, x, w, 1e-6).backward(x.detach())


def main() -> None:
    compile_instead_of_launching()
    chunk(128, 16, 32, 128)
    decode(torch.float32, True)
    recurrent()
    small_ops()
    if "--all" in sys.argv:
        decode(torch.bfloat16, False)
        chunk(1024, 16, 32, 128, 8)
        chunk(1024, 3, 6, 64, 64)
        chunk(128, 3, 6, 64)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
