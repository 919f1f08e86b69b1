"""``qnext bench``: this machine beside a peer, the engine under load, and how it holds out."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

import typer


class What(StrEnum):
    """What is measured."""

    single = "single"
    throughput = "throughput"
    latency = "latency"
    prefix = "prefix"
    overhead = "overhead"
    storm = "storm"
    soak = "soak"


def bench(
    what: Annotated[
        What,
        typer.Argument(
            help="single: one request, decoding, prefill and MTP. throughput, latency, prefix, "
            "overhead: the engine. storm, soak: aborts and long traffic, every answer compared."
        ),
    ] = What.single,
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
    prompt_tokens: Annotated[int | None, typer.Option(help="Length of prompts.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens per request.")] = None,
    batch: Annotated[int | None, typer.Option(help="Requests at a time.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each; the median counts.")] = 5,
    requests: Annotated[int, typer.Option(help="Of the storm.")] = 10_000,
    minutes: Annotated[float, typer.Option(help="Of the soak.")] = 15.0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Measure; all figures are from this run."""
    given = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    sizes = {name: value for name, value in given.items() if value is not None}
    if what is What.single:
        from qnext.bench import BenchOptions, run, table

        options = BenchOptions(
            model=model, against=against, dtype=dtype, peer_dtype=peer_dtype, device=device,
            repeats=repeats, **sizes,
        )  # fmt: skip
        found = run(options)
    else:
        from qnext.bench.load import table

        found = _engine(what, model, against, batch, repeats, requests, minutes, sizes,
                        {"dtype": dtype, "device": device})  # fmt: skip
    typer.echo(json.dumps(found) if as_json else table(found))


def _engine(
    what: What,
    model: str | None,
    against: str | None,
    batch: int | None,
    repeats: int,
    requests: int,
    minutes: float,
    sizes: dict[str, int],
    options: dict[str, Any],
) -> dict[str, Any]:
    from qnext.bench import load, stress

    def say(line: str) -> None:
        typer.echo(line, err=True)

    if what is What.throughput:
        count = {} if batch is None else {"batch": batch}
        return load.throughput(model, against=against, repeats=repeats, **count, **sizes, **options)
    if what is What.latency:
        count = {} if batch is None else {"concurrency": batch}
        return load.latency(model, **count, **sizes, **options)
    if what is What.prefix:
        return load.prefix(model, repeats=repeats, **options)
    if what is What.overhead:
        count = {} if batch is None else {"running": batch}
        return load.overhead(model, **count, **options)
    options.pop("dtype")
    if what is What.storm:
        return stress.storm(model, requests=requests, say=say, **options)
    return stress.soak(model, minutes=minutes, say=say, **options)
