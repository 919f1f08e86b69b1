"""Pretraining on one device: recipe in, Hugging Face folder out.

Read ``config`` (the recipe), ``data`` (packed batches), ``loss``, ``optim``, ``trainer`` (one
step, one loop), ``resume``, ``report``, ``evaluate``.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["train"]


def train(recipe: str | Path, overrides: list[str] | None = None) -> Path:
    """Run a recipe to its end (or go on where it stopped); the exported folder.

    Args:
        recipe: TOML file.
        overrides: ``section.key=value`` strings that replace values of the recipe.

    Raises:
        ConfigError: a bad recipe. TrainingError: data or checkpoint that do not fit.
    """
    from qnext.train.config import load_recipe
    from qnext.train.trainer import Trainer

    return Trainer(load_recipe(Path(recipe), overrides or [])).run()
