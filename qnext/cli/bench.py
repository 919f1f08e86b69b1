"""``qnext bench``: decode, prefill and MTP on this machine, beside a peer on the same weights."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def bench(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Default: the model in the box.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="A peer to measure beside: transformers.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of our weights.")] = "auto",
    peer_dtype: Annotated[
        str, typer.Option(help="Of the peer's weights; auto: the faster one.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    prompt_tokens: Annotated[int, typer.Option(help="Prefill length.")] = 2048,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded per run.")] = 128,
    repeats: Annotated[int, typer.Option(help="Runs of each; the median counts.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Measure decoding, prefill and MTP; all figures from this run."""
    from qnext.bench import BenchOptions, run, table

    options = BenchOptions(
        model=model, against=against, dtype=dtype, peer_dtype=peer_dtype, device=device,
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats,
    )  # fmt: skip
    result = run(options)
    typer.echo(json.dumps(result) if as_json else table(result))
