"""Delta rule, conv and norm kernels at the 80B shapes compile for sm_90 and do not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_kernels_compile_for_hopper():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("hopper_delta.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    tensor_cores = {"_scores", "_states", "_state_grads", "_score_grads", "_input_grads"}
    assert {k["kernel"] for k in found} == tensor_cores | {
        "_index", "_gate_grads", "_decode", "_recurrent", "_forward", "_final",
        "_backward",
    }  # fmt: skip
    # the serial kernels fill the registers; what they spill lies mostly outside their loop
    serial = {"_states", "_state_grads"}
    assert [k for k in found if k["stack"] > (320 if k["kernel"] in serial else 64)] == []
    # the tile for one long sequence has 32 columns, too narrow for a warpgroup's product
    assert {k["kernel"] for k in found if k["wgmma"]} >= tensor_cores - {"_states"}
    # the loops that stream from memory load ahead of their use, 16 bytes at a time
    ahead = {k["kernel"] for k in found if k["async"] and k["wide"]}
    assert {"_states", "_state_grads", "_input_grads"} <= ahead
