"""Every layout against one process, on real ranks that torchrun starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
LAYOUTS = [
    "",
    "context=4",
    "tensor=4",
    "expert=4",
    "expert=2",
    "context=2,tensor=2",
    "context=2,expert=4",
    "tensor=2,expert=2,recompute=1",
]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float]]:
    """Relative errors of loss and worst gradient, by layout; four ranks run them all."""
    out = tmp_path_factory.mktemp("layouts") / "errors.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", str(HERE / "layouts.py"), *LAYOUTS]
    env = {**os.environ, "OUT": str(out), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(out.read_text()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_of_one_process(
    errors: dict[str, tuple[float, float]], layout: str
) -> None:
    loss, gradient = errors[layout]
    assert loss < 1e-12
    assert gradient < 1e-9
