"""Checkpoints to go on from: tensors as safetensors, the rest as JSON, swapped in by a rename."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qnext.errors import TrainingError

LATEST = "latest"


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write ``folder/latest``; a crash at any point leaves the old one or the new one whole."""
    side, old, final = folder / "latest.part", folder / "latest.old", folder / LATEST
    shutil.rmtree(side, ignore_errors=True)
    side.mkdir(parents=True)
    host = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    host["rng"] = torch.get_rng_state()
    save_file(host, side / "state.safetensors")
    (side / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(side, final)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What ``save_checkpoint`` wrote last, or None.

    Raises:
        TrainingError: a checkpoint that cannot be read.
    """
    final = folder / LATEST
    if not final.exists():
        final = folder / "latest.old"  # killed between the two renames
    if not final.exists():
        return None
    try:
        tensors = load_file(final / "state.safetensors")
        facts = json.loads((final / "facts.json").read_text(encoding="utf-8"))
    except Exception as error:
        raise TrainingError(
            f"{final} cannot be resumed from: {error}", hint="remove it to start afresh"
        ) from error
    torch.set_rng_state(tensors.pop("rng"))
    return tensors, facts
