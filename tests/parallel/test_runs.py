"""Whole runs under torchrun: a killed rank, and a checkpoint that changes its number of ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from toy import write_recipe

from qnext.errors import ConfigError, TrainingError
from qnext.train import main

ROOT = Path(__file__).resolve().parents[2]
# A flat rate does not depend on the number of steps; balance is judged over the micro batches so
# far, and those come in another order on several ranks.
WORDS = ["log_every=1", "optimizer.decay_fraction=0", "optimizer.lr=2e-3", "data.micro_batches=4"]
WORDS += ["loss.load_balance=0", "device=cpu"]


def _torchrun(ranks: int, recipe: Path, *words: str, restarts: int = 0) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # Else a restarted rank finds addresses of the ranks that died (pytorch issue 135712).
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    command += ["-m", "qnext.train", str(recipe), *WORDS, *words]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def _finish(run: subprocess.Popen[str]) -> str:
    _, news = run.communicate(timeout=120)
    assert run.returncode == 0, news[-4000:]
    return news


def _losses(folder: Path) -> dict[int, tuple[float, float]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [r for r in map(json.loads, lines) if "loss" in r]
    assert len({r["step"] for r in rows}) == len(rows)
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in rows}


def test_a_run_survives_a_kill_and_moves_between_layouts(tmp_path: Path) -> None:
    moved, straight = tmp_path / "moved", tmp_path / "straight"
    recipe = write_recipe(moved)
    # Two data-parallel ranks, Muon; one of them is killed, torchrun starts both again.
    kind = "optimizer.kind=muon"
    run = _torchrun(2, recipe, "steps=16", "checkpoint_every=3", kind, restarts=1)
    facts = moved / "run" / "latest" / "facts.json"
    end = time.monotonic() + 60
    while not facts.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert facts.exists()
    workers = [p for p in psutil.Process(run.pid).children() if "qnext.train" in p.cmdline()]
    os.kill(workers[-1].pid, signal.SIGKILL)
    _finish(run)
    assert (moved / "run" / "latest" / ".metadata").exists()
    # Four ranks in another layout go on from there, ...
    layout = ["parallel.context_parallel_size=2", "parallel.expert_parallel_size=4"]
    _finish(_torchrun(4, recipe, "steps=20", kind, *layout))
    # ... and one process goes on from theirs.
    assert main(recipe, [*WORDS, "steps=24", kind]).steps == 24

    main(write_recipe(straight), [*WORDS, "steps=24", kind])
    got, want = _losses(moved), _losses(straight)
    assert got.keys() == want.keys()
    for step, values in want.items():
        assert got[step] == pytest.approx(values, rel=1e-6), step
    one = json.loads((straight / "run" / "evaluation.json").read_text())
    two = json.loads((moved / "run" / "evaluation.json").read_text())
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["tokens"] == one["tokens"]
    a = load_file(straight / "run" / "model" / "model.safetensors")
    b = load_file(moved / "run" / "model" / "model.safetensors")
    assert a.keys() == b.keys()


def test_layouts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    with pytest.raises(ConfigError, match="tensor_parallel_size = 2 needs more processes"):
        main(recipe, ["parallel.tensor_parallel_size=2"])
    with pytest.raises(ConfigError, match=r"unknown key parallel\.tensor"):
        main(recipe, ["parallel.tensor=2"])
    run = _torchrun(2, recipe, "data.micro_batches=1")
    _, news = run.communicate(timeout=60)
    assert run.returncode != 0
    assert "micro_batches 1 does not divide over 2 data-parallel ranks" in news


def test_a_damaged_sharded_checkpoint_is_named(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    main(recipe, ["steps=1"])
    latest = tmp_path / "run" / "latest"
    (latest / ".metadata").write_bytes(b"not a list of parts")
    with pytest.raises(TrainingError, match="cannot be resumed from"):
        main(recipe, ["steps=2"])
