"""Compile the decode kernels for sm_90 without a GPU: launches become compilations.

Run as a script with ``TRITON_INTERPRET`` unset; prints one JSON line per kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

WIDE = re.compile(r"ld\.global\.\S*v4\.b32|cp\.async\.c\S+ \[.*\], \[.*\], 0x10")


class Hopper:
    """The few answers that compiling asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack frame (spills) in the assembler's report."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    return {
        "registers": int(re.search(r"REG:(\d+)", text.stdout)[1]),
        "stack": int(re.search(r"STACK:(\d+)", text.stdout)[1]),
    }


def compile_instead_of_launching() -> None:
    launch = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        ptx = kernel.asm["ptx"]
        facts = {"kernel": self.__name__, "grid": grid, "warps": kernel.metadata.num_warps,
                 "shared": kernel.metadata.shared, **resources(kernel.asm["cubin"])}  # fmt: skip
        facts |= {"wgmma": "wgmma" in ptx, "stages": options.get("STAGES")}
        facts |= {"fp8": ".e4m3.e4m3" in ptx, "tma": "cp.async.bulk.tensor" in ptx}
        facts |= {"waits": "griddepcontrol.wait" in ptx, "wide": bool(WIDE.search(ptx))}
        print(json.dumps(facts))  # noqa: T201 - the script's answer
        return kernel

    driver.set_active(Hopper())
    JITFunction.run = run


def main() -> None:
    from qnext.kernels.attention import triton_decode
    from qnext.kernels.experts import triton_grouped, triton_single
    from qnext.kernels.gated_delta import triton_decode as delta
    from qnext.kernels.linear import triton as linear

    compile_instead_of_launching()
    bf16, fp8, i32 = torch.bfloat16, torch.float8_e4m3fn, torch.int32
    h, i, e, top = 2048, 512, 512, 10

    def matrix(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
        # never touched, so never given memory
        return torch.empty(shape, dtype=fp8), torch.empty(blocks)

    norm = torch.empty(h, dtype=bf16)
    experts = (*matrix(e, 2 * i, h), *matrix(e, h, i))
    shared = (*matrix(2 * i, h), *matrix(h, i))
    router = torch.empty(e + 1, h, dtype=bf16)
    for tokens in (1, 8, 32):
        x = torch.empty(tokens, h, dtype=bf16)
        tail = torch.empty(64, h, dtype=bf16)
        linear.linear(x, *matrix(12288, h), norm_weight=norm, tail=tail, pdl=True)
        linear.linear(torch.empty(tokens, 4096, dtype=bf16), *matrix(h, 4096), residual=x, pdl=True)
        moe = triton_single.moe if tokens == 1 else triton_grouped.moe
        moe(x, norm, router, experts, shared, top_k=top, pdl=True)
        cache = torch.empty(tokens, 64, 2, 256, dtype=bf16)
        triton_decode.decode_attention(
            torch.empty(tokens, 9216, dtype=bf16), norm[:256], norm[:256], torch.empty(tokens, 64),
            cache, cache, torch.zeros(tokens, 1, dtype=i32), torch.zeros(tokens, dtype=i32),
            heads=16, splits=8, pdl=True,
        )  # fmt: skip
        wide, gates = torch.empty(tokens, 12352, dtype=bf16), torch.empty(32)
        delta.fused_decode_ring(
            wide[:, :8192], wide[:, 8192:12288], wide[:, 12288:12320], wide[:, 12320:],
            torch.empty(tokens, 8192, 4, dtype=bf16), torch.empty(8192, 4, dtype=bf16), gates,
            gates, norm[:128], torch.empty(tokens, 32, 128, 128),
            torch.zeros(tokens, dtype=i32), torch.zeros(tokens, dtype=i32), 1e-6, pdl=True,
        )  # fmt: skip
    for tokens in (8, 64, 192):
        stream(tokens, experts, shared, router)


def stream(tokens: int, experts: tuple, shared: tuple, router: torch.Tensor) -> None:
    """The e4m3 way through a layer, and the verify step of MTP."""
    from qnext.kernels.experts import gluon_stream, triton_route
    from qnext.kernels.gated_delta import triton_verify as verify
    from qnext.kernels.linear import gluon_stream as linear
    from qnext.kernels.norm.triton_quantise import add_norm_quantise

    bf16, fp8, i32 = torch.bfloat16, torch.float8_e4m3fn, torch.int32
    h, i, e, top = 2048, 512, 512, 10
    x, q, scale = (torch.empty(tokens, h, dtype=d) for d in (bf16, fp8, torch.float32))
    scale = scale[:, : h // 128].contiguous()
    route = triton_route.buffers(tokens, top, e, gluon_stream.tile_for(tokens), "cpu")
    y = torch.empty(tokens * (top + 1), h)
    add_norm_quantise(x, x[0], x, q, scale, parts=y[: tokens * top].view(tokens, top, h),
                      extra=y[tokens * top :], zero=route["counts"], pdl=True)  # fmt: skip
    weight, blocks = torch.empty(12288, h, dtype=fp8), torch.empty(96, 16)
    tail = (torch.empty(64, h, dtype=bf16), x, torch.empty(4, tokens, 64))
    linear.stream_linear(q, scale, weight, blocks, torch.empty(tokens, 12288, dtype=bf16),
                         tail=tail, rows=128 if tokens == 64 else 64, pdl=True)  # fmt: skip
    logits = torch.empty(4, tokens, e + 1)
    linear.stream_linear(x, None, router, None, logits, split=4, pdl=True)
    triton_route.route_tasks(logits, route, top_k=top, pdl=True)
    act = torch.empty(tokens * (top + 1), i, dtype=bf16)
    gluon_stream.experts(q, scale, experts, shared, route, act, y, top_k=top, pdl=True)
    rows, n = 3, tokens // 3 or 1
    wide, gates = torch.empty(n * rows, 12352, dtype=bf16), torch.empty(32)
    verify.fused_verify_ring(
        wide[:, :8192], wide[:, 8192:12288], wide[:, 12288:12320], wide[:, 12320:],
        torch.empty(n, 8192, 8, dtype=bf16), torch.empty(8192, 4, dtype=bf16), gates, gates,
        torch.empty(128, dtype=bf16), torch.empty(n, 32, 128, 128), torch.zeros(n, dtype=i32),
        torch.zeros(n, dtype=i32), torch.zeros(n, dtype=i32),
        verify.verify_buffers(n, 32, 128, rows, "cpu"), 1e-6, pdl=True,
        out=torch.empty(n * rows, 4096, dtype=fp8), scale=torch.empty(n * rows, 32),
    )  # fmt: skip


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
