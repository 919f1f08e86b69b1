"""Pretraining on one device or many: recipe in, Hugging Face folder out.

Read ``config`` (the recipe), ``prepare`` and ``data`` (texts to packed batches), ``loss``,
``optim``, ``build``, ``trainer`` (one step, one loop), ``watch``, ``resume`` and ``sharded``,
``report``, ``evaluate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qnext.train.trainer import TrainResult

__all__ = ["main", "train"]


def main(recipe: str | Path, overrides: Sequence[str] = ()) -> TrainResult:
    """Run a recipe to its end, or go on where it stopped.

    Args:
        recipe: TOML file.
        overrides: ``section.key=value`` strings that replace values of the recipe.

    Raises:
        ConfigError: a bad recipe.
        TrainingError: data or a checkpoint that do not fit, or a loss that stays non-finite.
    """
    from qnext.parallel.launch import leave
    from qnext.train.config import load_recipe
    from qnext.train.trainer import Trainer

    result = Trainer(load_recipe(Path(recipe), list(overrides))).run()
    leave()
    return result


def train(recipe: str | Path, overrides: Sequence[str] | None = None) -> Path:
    """:func:`main`, giving just the exported folder."""
    return main(recipe, overrides or ()).model
