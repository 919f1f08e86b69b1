"""Pictures of a run, and one page with all of them that needs no other file."""

from __future__ import annotations

import base64
import html
import json
import logging
import math
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
pre { background: #f4f4f4; padding: 1rem; overflow-x: auto }
"""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All rows of ``metrics.jsonl``."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def plot(folder: Path) -> list[Path]:
    """Loss, gradient norm, speed and expert load as PNG; needs matplotlib (extra ``train``)."""
    try:
        import matplotlib
    except ImportError:
        log.warning("matplotlib is not installed; no plots (pip install 'qnext[train]')")
        return []
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    rows = read_metrics(folder)
    steps = [r for r in rows if "loss" in r]
    x = [r["step"] for r in steps]
    made = []

    def save(figure: Figure, name: str) -> None:
        made.append(folder / name)
        figure.savefig(made[-1], dpi=110)

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(x, [r["loss"] for r in steps], label="next token")
    if any(r.get("mtp_loss") for r in steps):
        left.plot(x, [r["mtp_loss"] for r in steps], label="MTP")
    held = [(r["step"], r["heldout"]["loss"]) for r in rows if "loss" in r.get("heldout", {})]
    if held:
        left.plot(*zip(*held, strict=True), "o", label="held-out")
    for event in (r for r in rows if "event" in r):
        left.axvline(event["from"], color="red", lw=0.8, label=event["event"])
    left.set(xlabel="step", ylabel="loss (nats per token)", title="training loss")
    left.legend()
    right.semilogy(x, [r["grad_norm"] for r in steps])
    right.set(xlabel="step", title="gradient norm before clipping")
    save(figure, "loss.png")

    if steps and "tokens_per_s" in steps[0]:
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(x, [r["tokens_per_s"] for r in steps])
        left.set(xlabel="step", title="tokens per second", ylim=(0, None))
        right.plot(x, [r["lr"] for r in steps])
        right.set(xlabel="step", title="learning rate")
        save(figure, "speed.png")

    loads = [r for r in steps if r.get("expert_load")]
    if loads:
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        image = left.imshow(loads[-1]["expert_load"], aspect="auto", cmap="viridis", vmin=0)
        left.set(xlabel="expert", ylabel="sparse layer, then MTP by depth",
                 title="expert load at the end (1 = balanced)")  # fmt: skip
        figure.colorbar(image)
        x = [r["step"] for r in loads]
        for pick, name in ((max, "largest"), (min, "smallest")):
            right.plot(x, [pick(map(pick, r["expert_load"])) for r in loads], label=name)
        right.set(xlabel="step", title="extreme loads")
        right.legend()
        save(figure, "expert_load.png")
    return made


def write_page(folder: Path, pictures: list[Path]) -> Path:
    """``report.html``: summary, pictures, what happened, the resolved recipe."""
    rows = read_metrics(folder)
    steps = [r for r in rows if "loss" in r]
    last: dict[str, Any] = steps[-1] if steps else {}
    facts: dict[str, Any] = {"steps": last.get("step"), "tokens": last.get("tokens")}
    rates = sorted(r["tokens_per_s"] for r in steps if "tokens_per_s" in r)
    if rates:
        facts["tokens per second, median"] = rates[len(rates) // 2]
    for key in ("loss", "mtp_loss", "mfu", "memory_gib", "skipped", "load_max", "load_min"):
        if key in last:
            facts[f"{key} at the end"] = last[key]
    held = [r["heldout"] for r in rows if "heldout" in r]
    if held:
        facts |= {f"held-out {k.replace('_', ' ')}": v for k, v in held[-1].items()}
    body = ["<h1>Training run</h1>", _table(facts)]
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        body.append(f'<p><img alt="{picture.stem}" src="data:image/png;base64,{data}"></p>')
    events = [r for r in rows if "event" in r]
    if events:
        body.append("<h2>Events</h2>")
        body += [
            f"<p>{html.escape(e['event'])}: step {e['from']} back to {e['step']}, "
            f"{html.escape(str(e['why']))}</p>"
            for e in events
        ]
    recipe = folder / "run.toml"
    if recipe.is_file():
        text = html.escape(recipe.read_text(encoding="utf-8"))
        body.append(f"<h2>Recipe</h2><pre>{text}</pre>")
    page = folder / "report.html"
    head = f"<!doctype html><meta charset=utf-8><title>Training run</title><style>{_STYLE}</style>"
    page.write_text(head + "\n".join(body) + "\n", encoding="utf-8")
    return page


def _table(facts: dict[str, Any]) -> str:
    cells = []
    for name, value in facts.items():
        if isinstance(value, float) and math.isfinite(value):
            value = f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        elif isinstance(value, int):
            value = f"{value:,}"
        if value is not None:
            cells.append(f"<tr><th>{html.escape(name)}</th><td>{value}</td></tr>")
    return f"<table>{''.join(cells)}</table>"
