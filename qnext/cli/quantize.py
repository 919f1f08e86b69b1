"""``qnext quantize``: a checkpoint in FP8 or INT4, and how much it lost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from qnext.cli.checkpoints import check_target, parse_size

REPORT = "quantization_report"
TOKENS = 2048
"""Longest sequence of the fixed texts."""


def quantize(
    source: Annotated[str, typer.Argument(help="Folder or hub id of plain weights.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    format: Annotated[str, typer.Option(help="fp8 or int4.")] = "fp8",
    group_size: Annotated[int, typer.Option(help="Columns per INT4 scale: 32 or 128.")] = 128,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Keep this module plain too; name or re:pattern; may be repeated."),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option(help="Choose INT4 scales by a calibration text, or by the largest.")
    ] = True,
    report: Annotated[bool, typer.Option(help="Measure against the source afterwards.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Such as 500MB or 5GB.")] = "5GB",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    offline: Annotated[bool, typer.Option(help="Use only what is downloaded.")] = False,
    force: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Quantise a checkpoint to FP8 blocks or compressed-tensors INT4, layer by layer.

    Router, gates, in_proj_ba, mtp.fc and head stay plain. The report (KL, perplexity and bits
    per byte on a fixed text, error per layer) is written beside the weights.
    """
    from qnext.checkpoint.compare import compare
    from qnext.checkpoint.load import parse_device
    from qnext.checkpoint.progress import transfer_bar
    from qnext.checkpoint.quantize import quantize as run
    from qnext.checkpoint.texts import fixed_text, tokenize
    from qnext.hub import resolve_model

    size, place = parse_size(max_shard_size), parse_device(device)
    folder = resolve_model(source, revision=revision, offline=offline)
    check_target(folder, target, force)
    started = time.perf_counter()
    documents = None
    if calibrate and format == "int4":
        documents = tokenize(fixed_text("calibration"), folder, TOKENS)
    with transfer_bar("quantise", "layers") as bar:
        plan = run(
            folder, target, format=format, group_size=group_size, ignore=tuple(ignore or ()),
            documents=documents, device=place, max_shard_size=size, advance=bar,
        )  # fmt: skip
    typer.echo(f"[{len(plan.schemes)} matrices in {time.perf_counter() - started:.1f} s]", err=True)
    if not report:
        typer.echo(str(target))
        return
    texts = fixed_text("evaluation")
    with transfer_bar("measure", "layers") as bar:
        found = compare(
            folder, target, tokenize(texts, folder, TOKENS),
            sum(len(text.encode()) for text in texts), device=place, advance=bar,
        )  # fmt: skip
    facts = json.dumps(found.as_dict(), indent=2)
    (target / f"{REPORT}.json").write_text(facts + "\n", encoding="utf-8")
    (target / f"{REPORT}.md").write_text(found.as_markdown(), encoding="utf-8")
    typer.echo(json.dumps(found.as_dict()) if as_json else found.as_markdown(), nl=as_json)
