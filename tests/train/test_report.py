"""Metrics, the FLOP count, plots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy import MODEL

from qnext.config import ModelConfig
from qnext.train.bar import Bar, clock
from qnext.train.plots import plot, write_page
from qnext.train.report import Report, flops_per_token


def test_rows_hold_rates_and_time_left(tmp_path: Path) -> None:
    report = Report(tmp_path, steps=10, start=0, flops=1e6, peak=1e12)
    row = report.step(4, 1000, {"loss": 2.0}, progress=0.4)
    report.close()
    assert row["tokens"] == 4000
    assert row["mfu"] == pytest.approx(row["tokens_per_s"] * 1e-6)
    # Six of ten steps are left, at the speed of the first four.
    assert row["eta_s"] == pytest.approx(6000 / row["tokens_per_s"], rel=1e-3)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == row


def test_lines_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    Report(tmp_path, steps=10, start=2, flops=1.0, peak=None).close()
    assert [json.loads(r)["step"] for r in file.read_text().splitlines()] == [1, 2]


def test_flops_are_six_per_active_weight_and_the_mixers() -> None:
    plain = {**MODEL, "model_type": "qwen3", "intermediate_size": 24, "num_nextn_predict_layers": 0}
    dense = ModelConfig.from_dict({k: v for k, v in plain.items() if "full_attention" not in k})
    head = 32 * 16
    attention = 16 * (2 * 8) * 2 + 16 * 8 * 2  # q and o; k and v
    weights = 2 * (attention + 3 * 16 * 24) + head
    scores = 2 * 6 * 64 * 2 * 8  # layers, 3 x 2 products over half of 64 tokens, heads, width
    assert flops_per_token(dense, 64, 0) == 6 * weights + scores

    sparse = ModelConfig.from_dict(MODEL)
    wider = ModelConfig.from_dict({**MODEL, "num_experts": 8})
    # Twice the experts cost only their rows of the router (two layers), each 16 wide.
    grown = flops_per_token(wider, 64, 0) - flops_per_token(sparse, 64, 0)
    assert grown == pytest.approx(6 * 2 * 4 * 16)
    # Every depth of MTP costs the same: its layer and the head again.
    depths = [flops_per_token(sparse, 64, d) for d in range(3)]
    assert depths[2] - depths[1] == pytest.approx(depths[1] - depths[0])
    assert depths[1] - depths[0] > 6 * head


def test_plots_are_pictures(tmp_path: Path) -> None:
    rows = [
        {"step": s, "loss": 3 / s, "mtp_loss": 4 / s, "grad_norm": 1.0, "expert_load": [[1, 1.5]]}
        for s in (1, 2)
    ]
    lines = [*map(json.dumps, rows), json.dumps({"step": 2, "heldout": {"bits_per_byte": 1.0}})]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    made = plot(tmp_path)
    assert [p.name for p in made] == ["loss.png", "expert_load.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in made)


def test_the_page_stands_alone(tmp_path: Path) -> None:
    rows = [
        {"step": s, "tokens": 10 * s, "loss": 3 / s, "mtp_loss": 0.0, "grad_norm": 1.0, "lr": 0.1,
         "tokens_per_s": 50.0 + s, "expert_load": [[1, 1.5]]} for s in (1, 2, 3)
    ]  # fmt: skip
    events = [{"step": 1, "event": "rollback", "from": 2, "why": "the loss is <nan>"}]
    events += [{"step": 3, "heldout": {"loss": 1.25, "bits_per_byte": 0.5}}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*rows, *events])))
    (tmp_path / "run.toml").write_text('output = "x"\n')
    pictures = plot(tmp_path)
    assert [p.name for p in pictures] == ["loss.png", "speed.png", "expert_load.png"]
    page = write_page(tmp_path, pictures).read_text()
    assert page.count("data:image/png;base64,") == 3
    assert 'src="data:' in page
    assert 'src="loss' not in page
    for text in ("&lt;nan&gt;", "held-out bits per byte", "output = &quot;x&quot;", "52"):
        assert text in page, text


def test_the_bar_shows_what_people_watch() -> None:
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    bar = Bar(100, 20, Console(file=out, force_terminal=True, width=150))
    bar.update(
        {"step": 40, "loss": 2.34567, "mtp_loss": 3.1, "grad_norm": 0.5, "tokens_per_s": 123456.7,
         "mfu": 0.351, "memory_gib": 12.34, "skipped": 0.0, "eta_s": 3725.0}
    )  # fmt: skip
    bar.close()
    text = out.getvalue()
    for part in ("40/100", "loss 2.3457", "mtp 3.100", "123,457 tok/s", "MFU 35.1%", "12.3 GiB",
                 "left 1:02:05"):  # fmt: skip
        assert part in text, part
    assert "skipped" not in text
    assert clock(59.9) == "0:59"
