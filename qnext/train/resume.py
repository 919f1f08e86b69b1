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

#: What a checkpoint of many ranks has and one of a single process has not.
METADATA = ".metadata"
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


def latest(folder: Path) -> Path | None:
    """The last whole checkpoint under ``folder``, if there is one."""
    # The second: killed between the two renames.
    return next((p for p in (folder / LATEST, folder / "latest.old") if p.exists()), None)


def read_checkpoint(found: Path) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    """Tensors and facts of a checkpoint; no tensors if it was written by many ranks.

    Raises:
        TrainingError: a checkpoint that cannot be read.
    """
    try:
        facts = json.loads((found / "facts.json").read_text(encoding="utf-8"))
        if (found / METADATA).exists():
            return None, facts
        tensors = load_file(found / "state.safetensors")
    except Exception as error:
        raise TrainingError(
            f"{found} cannot be resumed from: {error}", hint="remove it to start afresh"
        ) from error
    torch.set_rng_state(tensors.pop("rng"))
    return tensors, facts
