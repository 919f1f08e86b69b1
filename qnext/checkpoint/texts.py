"""The two fixed texts in the package: one to calibrate with, one to measure on."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qnext.text import Tokenizer


def fixed_text(name: Literal["calibration", "evaluation"]) -> list[str]:
    """The documents of a fixed text."""
    text = (files("qnext") / "assets" / "texts" / f"{name}.txt").read_text(encoding="utf-8")
    return text.strip().split("\n\f\n")


def tokenize(documents: list[str], folder: Path, limit: int) -> list[Tensor]:
    """Token ids per document by the tokenizer of a checkpoint.

    Args:
        documents: texts.
        folder: of the checkpoint.
        limit: longest piece; longer documents are cut into several.
    """
    found = Tokenizer.from_pretrained(folder).encode_batch(documents)
    ids = [torch.tensor(one, dtype=torch.int64) for one in found]
    return [piece for one in ids for piece in one.split(limit)]
