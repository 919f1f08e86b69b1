"""A killed run goes on as if nothing had happened, to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import write_recipe

from qnext.errors import TrainingError
from qnext.train import main
from qnext.train.resume import latest, read_checkpoint, save_checkpoint


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    found = latest(folder)
    if found is None:
        return None
    tensors, facts = read_checkpoint(found)
    assert tensors is not None
    return tensors, facts


def _state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "latest" / "state.safetensors")


def _losses(folder: Path) -> list[tuple[int, float, float]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [r for r in map(json.loads, lines) if "loss" in r]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in rows]


def _same_runs(a: Path, b: Path) -> None:
    one, two = _state(a), _state(b)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    assert _losses(a) == _losses(b)


def _start(recipe: Path, *overrides: str) -> subprocess.Popen[bytes]:
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "qnext.train", str(recipe), *overrides]
    return subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)


def test_killed_and_resumed_is_bitwise_the_same(tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    recipe = write_recipe(killed)
    # Many more steps than it will get, at a rate that does not depend on how many there are.
    flat = ["log_every=1", "optimizer.decay_fraction=0"]
    run = _start(recipe, *flat, "steps=100000", "checkpoint_every=3")
    facts = killed / "run" / "latest" / "facts.json"
    try:
        end = time.monotonic() + 100
        while not facts.exists() and time.monotonic() < end:
            time.sleep(0.005)
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    found = load_checkpoint(killed / "run")
    assert found is not None
    step = found[1]["step"]
    assert step % 3 == 0
    target = f"steps={step + 5}"
    straight = tmp_path / "straight"
    main(write_recipe(straight), [*flat, target])
    assert main(recipe, [*flat, target]).finished
    _same_runs(straight, killed)


def test_stopping_and_going_on_is_the_same_run(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    main(write_recipe(first), ["dtype=bfloat16"])
    recipe = write_recipe(second)
    calls = 0
    while not (result := main(recipe, ["dtype=bfloat16", "stop_after_s=0.05"])).finished:
        calls += 1
        assert calls < 20
    assert calls > 0
    assert result.steps == 12
    _same_runs(first, second)


def test_another_model_or_other_data_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    main(recipe, ["steps=1"])
    with pytest.raises(TrainingError, match=r"another data\.seq_len, model\.num_experts"):
        main(recipe, ["steps=2", "model.num_experts=8", "data.seq_len=16"])
    # How a step is computed may change.
    assert main(recipe, ["steps=2", "data.micro_batches=1"]).steps == 2


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    main(recipe, ["steps=1"])
    state = tmp_path / "run" / "latest" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(TrainingError, match="cannot be resumed from"):
        main(recipe, ["steps=2"])


@pytest.mark.parametrize("cut", ["part", "between", "cleanup"])
def test_a_kill_during_a_save_leaves_a_whole_checkpoint(tmp_path: Path, cut: str) -> None:
    old, new = {"x": torch.zeros(3)}, {"x": torch.ones(3)}
    save_checkpoint(tmp_path, old, {"step": 1})
    if cut == "part":  # killed while the new one is written
        (tmp_path / "latest.part").mkdir()
        (tmp_path / "latest.part" / "state.safetensors").write_bytes(b"half")
        want = 1
    elif cut == "between":  # killed between the two renames
        (tmp_path / "latest").rename(tmp_path / "latest.old")
        (tmp_path / "latest.part").mkdir()
        want = 1
    else:  # killed before the old one was removed
        (tmp_path / "latest").rename(tmp_path / "latest.old")
        save_checkpoint(tmp_path / "side", new, {"step": 2})
        (tmp_path / "side" / "latest").rename(tmp_path / "latest")
        want = 2
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["step"] == want
    assert float(found[0]["x"][0]) == want - 1
    save_checkpoint(tmp_path, new, {"step": 3})
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["step"] == 3


def test_there_may_be_nothing_to_resume(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None


_KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from qnext.train import main
import qnext.train.trainer

torch.set_num_threads(1)
recipe, words, run = sys.argv[1], sys.argv[2:], Path(sys.argv[1]).parent / "run"
rng = random.Random(5)
for kind in ("save", "step", "save", "step", "save"):
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    child = os.fork()
    if child == 0:
        main(recipe, words)
        os._exit(0)
    end = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size > before) and time.monotonic() < end:
        time.sleep(0.001)
    if kind == "step":
        time.sleep(rng.random() * 0.3)
    else:
        while not (run / "latest.part").exists() and time.monotonic() < end:
            pass
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it ended before it was killed"
    print(kind, (run / "latest.part").exists(), sorted(p.name for p in run.glob("latest*")))
"""


def test_kills_at_any_moment_change_nothing(tmp_path: Path) -> None:
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    recipe = write_recipe(killed)
    flat = ["log_every=1", "optimizer.decay_fraction=0"]
    words = [*flat, "checkpoint_every=1", "optimizer.kind=muon"]
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", _KILLER, str(recipe), *words, "steps=100000"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # At least one kill left a half-written checkpoint behind.
    assert "save True" in done.stdout
    found = load_checkpoint(killed / "run")
    assert found is not None
    target = f"steps={found[1]['step'] + 3}"
    assert main(recipe, [*words, target]).finished
    main(write_recipe(straight), [*words, target])
    _same_runs(straight, killed)
