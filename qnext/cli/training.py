"""``qnext train`` and ``qnext data``: from a recipe to a model, from sources to token shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="TOML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, such as optimizer.lr=1e-3")
    ] = None,
) -> None:
    """Train a model; the same command goes on after an interruption."""
    from qnext.train import train as run

    typer.echo(str(run(recipe, overrides or [])))


def data(
    sources: Annotated[Path, typer.Argument(help="TOML file that lists the sources.")],
    out: Annotated[Path, typer.Argument(help="Folder for corpus, tokenizer and shards.")],
) -> None:
    """Fetch and clean text, train a tokenizer on it, and write token shards."""
    from qnext.train.corpus import prepare

    typer.echo(str(prepare(sources, out)))
