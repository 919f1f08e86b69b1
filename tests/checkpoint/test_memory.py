"""Loading streams: at its peak the host holds the weights and a few chunks of files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import HYBRID

from qnext.checkpoint import build_model, save_model
from qnext.checkpoint.quantize import quantize
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
grown = peak() - before
if len(sys.argv) > 3:  # a pass over the model dequantises some rows at a time
    with torch.no_grad():
        model(torch.arange(4))
sys.stdout.write(f"{grown} {sum(p.nbytes for p in model.parameters())} {peak() - before}")
"""


LARGE = {**HYBRID, "hidden_size": 512, "vocab_size": 9000, "num_experts": 32,
         "moe_intermediate_size": 256, "mlp_only_layers": []}  # fmt: skip


def measure(repository: Path, *arguments: object) -> list[int]:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        capture_output=True, text=True, cwd=repository, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return [int(word) for word in run.stdout.split()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models")
    for name, config in (("tiny", HYBRID), ("large", LARGE)):
        model = build_model(ModelConfig.from_dict(config), torch.float32)
        save_model(model, where / name, max_shard_size=SHARD)
    return where


def test_peak_memory_of_loading_shards(folders: Path, repository: Path) -> None:
    files = SafetensorsFolder(folders / "large")
    assert files.nbytes > 200 * MB
    assert len(files.files) > 9
    grown, weights, _ = measure(repository, folders / "tiny", folders / "large")
    assert weights == files.nbytes
    assert 0.9 * weights < grown < weights + 20 * MB


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_quantised_weights_are_in_memory_once(format: str, folders: Path, repository: Path) -> None:
    packed = folders / format
    quantize(folders / "large", packed, format=format, group_size=32, max_shard_size=SHARD)
    files = SafetensorsFolder(packed)
    grown, weights, after = measure(repository, folders / "tiny", packed, "run")
    assert weights < 0.45 * SafetensorsFolder(folders / "large").nbytes
    assert weights == pytest.approx(files.nbytes, rel=0.01)
    assert 0.9 * weights < grown < weights + 20 * MB
    # Some rows in fp32 (PIECE elements, twice while they are scaled) and a few activations.
    assert after < weights + 80 * MB
