"""The prefill kernels at the 80B shapes compile for sm_90, with wide copies and few spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_prefill_kernels_compile_for_hopper():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("hopper_prefill.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    grouped = {"_gate_up", "_down", "_grouped_gate_up", "_grouped_down"}
    tensor_cores = grouped | {"_attend", "_prepare", "_walk"}
    assert {k["kernel"] for k in found} == tensor_cores | {
        "_route", "_tiles", "_place", "_combine", "_norm", "_gated", "_index", "_heads", "_store",
        "_merge",
    }  # fmt: skip
    # the plain kernel behind the specialised one holds a product and a sum of 128 registers each
    assert [k for k in found if k["stack"] > (256 if k["kernel"] == "_gate_up" else 128)] == []
    assert {k["kernel"] for k in found if k["wgmma"]} == tensor_cores
    # 227 KB is all the shared memory of a multiprocessor
    assert [k for k in found if k["shared"] > 232448] == []
    ahead = {k["kernel"] for k in found if k["async"]}
    assert grouped | {"_attend"} <= ahead
    small = {"_route", "_tiles", "_place", "_index"}
    assert {k["kernel"] for k in found if not k["wide"]} <= small
