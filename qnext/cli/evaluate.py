"""``qnext eval``: held-out loss, MTP acceptance, needle in a haystack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from qnext.cli import session
from qnext.errors import RequestError


def evaluate(
    model: session.Model = None,
    shards: Annotated[
        list[str] | None, typer.Option(help="Folder of token shards; may be repeated.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="jsonl, parquet or text files (globs), tokenised here.")
    ] = None,
    text_key: Annotated[str, typer.Option(help="Field that holds the text of a record.")] = "text",
    seq_len: Annotated[int, typer.Option(help="Tokens of the longest sequence.")] = 1024,
    needle: Annotated[
        str | None, typer.Option(help="Lengths for the needle test, such as 512,2048.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, such as hellaswag,arc_easy.")
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(help="Folder with task files of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most documents per task.")] = None,
    trials: Annotated[int, typer.Option(help="Needles per length and depth.")] = 4,
    dtype: session.Dtype = "auto",
    device: session.Device = "auto",
    revision: session.Revision = None,
    offline: session.Offline = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Score a model: nats and bits per byte of text, accepted MTP drafts, recall over length."""
    if not (shards or text or needle or tasks):
        hint = "give --shards, --text, --needle or --tasks"
        raise RequestError("nothing to evaluate", hint=hint)
    from qnext.checkpoint import load_model
    from qnext.hub import resolve_model
    from qnext.text import Tokenizer
    from qnext.train.evaluate import evaluate as score
    from qnext.train.loss import Objective
    from qnext.train.needle import find_needles
    from qnext.train.texts import gather

    lengths = _lengths(needle)
    folder = resolve_model(model, revision=revision, offline=offline)
    loaded = load_model(folder, dtype=dtype, device=device)
    result: dict[str, Any] = {"model": str(folder)}
    if shards or text:
        parts = gather(folder, shards or [], text or [], text_key, loaded.config.vocab_size)
        result["heldout"] = score(Objective(loaded), parts, seq_len, 8 * seq_len).to_dict()
    if lengths:
        tokenizer = Tokenizer.from_pretrained(folder)
        places = find_needles(loaded, tokenizer, lengths, trials=trials)
        result["needle"] = [place.to_dict() for place in places]
    if tasks:
        from qnext.cli.harness import run_tasks

        result["tasks"] = run_tasks(loaded, folder, tasks.split(","), include_path, limit)
    typer.echo(json.dumps(result) if as_json else table(result))


def _lengths(needle: str | None) -> list[int]:
    if needle is None:
        return []
    try:
        return [int(part) for part in needle.split(",")]
    except ValueError as error:
        raise RequestError(f"--needle {needle!r} is not a list of lengths") from error


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [f"model {Path(result['model']).name}"]
    for name, value in result.get("heldout", {}).items():
        if value is not None:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            lines.append(f"{name.replace('_', ' '):20} {shown}")
    for task, values in result.get("tasks", {}).items():
        for name, value in values.items():
            lines.append(f"{task} {name.partition(',')[0]:20} {value:.4f}")
    places = result.get("needle", [])
    if places:
        depths = sorted({place["depth"] for place in places})
        head = "".join(f"{depth:>12.0%}" for depth in depths)
        lines += ["", "needle found (nats of its number) by depth", f"{'length':>9}{head}"]
        for length in dict.fromkeys(place["length"] for place in places):
            row = {p["depth"]: p for p in places if p["length"] == length}
            cells = "".join(
                f"{row[d]['found']:>5.0%} ({row[d]['nats']:4.1f})".rjust(12) for d in depths
            )
            lines.append(f"{length:>9,}{cells}")
    return "\n".join(lines)
