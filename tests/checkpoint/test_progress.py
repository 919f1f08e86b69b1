"""The bar: bytes and speed on a terminal, nothing elsewhere; threads that fill one model."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import tiny_model

from qnext.checkpoint import load_model, save_model
from qnext.checkpoint import progress as module
from qnext.checkpoint.progress import transfer_bar
from qnext.checkpoint.reader import SafetensorsFolder


def terminal() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=120, color_system=None), out


def test_gigabytes_and_their_speed() -> None:
    console, out = terminal()
    with transfer_bar("loading x", console=console) as report:
        report(0, 4_000_000_000)
        report(2_500_000_000, 4_000_000_000)
    text = out.getvalue()
    assert "loading x" in text
    assert "2.5/4.0 GB" in text


def test_layers_are_counted() -> None:
    console, out = terminal()
    with transfer_bar("quantise", "layers", console) as report:
        report(3, 12)
    assert " 3/12 layers" in out.getvalue()


def test_nothing_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with transfer_bar("loading x", console=Console(file=out)) as report:
        report(1, 2)
    assert out.getvalue() == ""


def test_loading_with_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny_model(torch.float32), tmp_path, max_shard_size=20_000)
    console, out = terminal()
    shown = module.transfer_bar
    monkeypatch.setattr(
        "qnext.checkpoint.load.transfer_bar", lambda label: shown(label, console=console)
    )
    load_model(tmp_path, device="cpu", progress=True)
    assert f"loading {tmp_path.name}" in out.getvalue()


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_any_number_of_threads_loads_the_same(threads: int, tmp_path: Path) -> None:
    from qnext.checkpoint.census import read_layout
    from qnext.checkpoint.fill import fill
    from qnext.checkpoint.load import empty_model

    model = tiny_model(torch.float32)
    save_model(model, tmp_path, max_shard_size=20_000)
    files = SafetensorsFolder(tmp_path)
    layout = read_layout(files)
    again = empty_model(layout.config, torch.float32, {}, torch.device("cpu"))
    lock, calls = threading.Lock(), []

    def report(done: int, total: int) -> None:
        assert lock.acquire(blocking=False)  # one call at a time
        calls.append((done, total))
        lock.release()

    fill(again, layout, files, report, threads=threads)
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert calls[-1] == (files.nbytes, files.nbytes)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_large_tensors_are_cut_into_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qnext.checkpoint.fill as filling

    model = tiny_model(torch.bfloat16)
    save_model(model, tmp_path)
    monkeypatch.setattr(filling, "SPAN", 1000)
    monkeypatch.setattr(filling, "CHUNK", 64)
    for dtype in ("bfloat16", "float32"):
        again = load_model(tmp_path, device="cpu", dtype=dtype)
        for (name, p), (_, q) in zip(
            model.named_parameters(), again.named_parameters(), strict=True
        ):
            assert torch.equal(p.to(q.dtype), q), name
