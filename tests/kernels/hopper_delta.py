"""Compile the delta rule, conv and norm kernels for sm_90 without a GPU, one JSON line each.

Run as a script with ``TRITON_INTERPRET`` unset; launches become compilations.
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
    seen = set()

    def run(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash in seen:
            return kernel
        seen.add(kernel.hash)
        ptx = kernel.asm["ptx"]
        print(json.dumps({
            "kernel": self.__name__, **resources(kernel.asm["cubin"]),
            "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps,
            "wgmma": ptx.count("wgmma.mma_async"), "mma": ptx.count("mma.sync"),
            "async": ptx.count("cp.async.c"),
        }), flush=True)  # fmt: skip
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


def main() -> None:
    compile_instead_of_launching()
    chunk(128, 16, 32, 128)
    if "--all" in sys.argv:
        chunk(1024, 16, 32, 128, 8)
        chunk(1024, 3, 6, 64, 64)
        chunk(128, 3, 6, 64)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
