"""``qnext train`` and ``qnext data``: from a recipe to a model, from texts to token shards."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(name="data", help="Token shards: from your files, or a corpus from packages.")


def train(
    recipe: Annotated[Path, typer.Argument(help="TOML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, such as optimizer.lr=1e-3")
    ] = None,
) -> None:
    """Train a model; the same command goes on after an interruption."""
    from qnext.train import train as run

    _tell_progress()
    typer.echo(str(run(recipe, overrides or [])))


@data.command()
def prepare(
    recipe: Annotated[Path, typer.Argument(help="TOML file that lists the sources.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as on_bad_record=skip")
    ] = None,
) -> None:
    """Tokenise jsonl, parquet and text files or hub data sets into token shards, once."""
    from qnext.train.prepare import prepare_shards

    _tell_progress()
    for folder in prepare_shards(recipe, overrides or []):
        typer.echo(str(folder))


@data.command()
def corpus(
    sources: Annotated[Path, typer.Argument(help="TOML file that lists the sources.")],
    out: Annotated[Path, typer.Argument(help="Folder for text, tokenizer and shards.")],
    work: Annotated[Path | None, typer.Option(help="Folder for downloads: OUT/work.")] = None,
    vocab_size: Annotated[int, typer.Option(help="Tokens of the tokenizer.")] = 8192,
    sample_mb: Annotated[float, typer.Option(help="Text the tokenizer is trained on, MB.")] = 40,
    jobs: Annotated[int | None, typer.Option(help="Processes; default: all cores.")] = None,
    heldout_bytes: Annotated[int, typer.Option(help="Size of the held-out split.")] = 1_000_000,
) -> None:
    """Fetch and clean text of public packages, train a tokenizer on it, write token shards."""
    from qnext.train.corpus import prepare as build

    _tell_progress()
    shards = build(
        sources,
        out,
        work,
        vocab_size=vocab_size,
        sample_mb=sample_mb,
        jobs=jobs,
        heldout_bytes=heldout_bytes,
    )
    typer.echo(str(shards))


def describe_training(recipe: Path, ranks: int, as_json: bool) -> str:
    """What a recipe takes on every one of ``ranks`` devices: memory, and bytes sent in a step."""
    from qnext.config import ModelConfig
    from qnext.hub import resolve_model
    from qnext.train.config import load_recipe
    from qnext.train.plan import plan_training, table

    config = load_recipe(recipe, [])
    if config.init_from is not None:
        folder = resolve_model(config.init_from, allow_patterns=["config.json"], progress=False)
        model = ModelConfig.from_pretrained(folder)
    else:
        model = ModelConfig.from_dict(config.model)
    data = config.data
    made = plan_training(
        model, config.parallel, ranks=ranks, seq_len=data.seq_len, batch_tokens=data.batch_tokens,
        micro_batches=data.micro_batches, mtp_depth=config.loss.mtp_depth,
        muon=config.optimizer.kind == "muon",
    )  # fmt: skip
    if as_json:
        return json.dumps({**asdict(made), "total": made.total})
    return table({f"{ranks} ranks": made})


def _tell_progress() -> None:
    """Long work says on stderr how far it is."""
    logger = logging.getLogger("qnext.train")
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
