"""Loading streams: at its peak the host holds the weights and about one shard."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from tiny import HYBRID

from qnext.checkpoint import build_model, save_model
from qnext.checkpoint.reader import SafetensorsFolder
from qnext.config import ModelConfig

MB = 1_000_000
SHARD = 20 * MB
# The peak before and after loading, in a process of its own. On Linux ru_maxrss would start at
# the peak of the parent, VmHWM does not.
SCRIPT = """
import re, resource, sys
import torch
from qnext.checkpoint import load_model

def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])

torch.set_num_threads(1)
load_model(sys.argv[1], device="cpu")  # a tiny model, so that everything is imported
before = peak()
model = load_model(sys.argv[2], device="cpu")
sys.stdout.write(f"{peak() - before} {sum(p.nbytes for p in model.parameters())}")
"""


def test_peak_memory_of_loading_shards(tmp_path: Path, repository: Path) -> None:
    tiny = ModelConfig.from_dict(HYBRID)
    large = ModelConfig.from_dict({**HYBRID, "hidden_size": 512, "vocab_size": 9000,
                                   "num_experts": 32, "moe_intermediate_size": 256})  # fmt: skip
    for name, config in (("tiny", tiny), ("large", large)):
        model = build_model(config, torch.float32)
        save_model(model, tmp_path / name, max_shard_size=SHARD)
        del model
    files = SafetensorsFolder(tmp_path / "large")
    assert files.nbytes > 200 * MB
    assert len(files.files) > 9
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "tiny", tmp_path / "large"],
        capture_output=True, text=True, cwd=repository, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    grown, weights = map(int, run.stdout.split())
    assert weights == files.nbytes
    assert 0.9 * weights < grown < weights + SHARD + 15 * MB
