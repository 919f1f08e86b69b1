"""Checkpoints of many ranks: each writes what it holds; any number of ranks reads it.

``torch.distributed.checkpoint`` in a folder that is swapped in by a rename, written on a thread
while training goes on (the tensors are copied to the host first).
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from qnext.errors import TrainingError
from qnext.train.resume import LATEST


class ShardedSaver:
    """Writes ``folder/latest``, one save at a time; every rank must make the same calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Its own group: the thread's messages must not mix with those of training.
        self.group = dist.new_group(backend="gloo")
        self.pending: Future[Any] | None = None

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Begin to write; returns when the tensors are copied."""
        self.wait()
        side = self.folder / "latest.part"
        if dist.get_rank() == 0:
            shutil.rmtree(side, ignore_errors=True)
            side.mkdir(parents=True)
            (side / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        dist.barrier(group=self.group)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.pending = dcp.async_save(  # type: ignore[assignment]
                dict(tensors), checkpoint_id=str(side), process_group=self.group
            )

    def poll(self) -> None:
        """Put a finished save in place, without waiting for an unfinished one."""
        if self.pending is not None and self.pending.done():
            self._finish()

    def wait(self) -> None:
        """Wait for the save that is under way, and put it in place."""
        if self.pending is not None:
            self._finish()

    def _finish(self) -> None:
        assert self.pending is not None
        self.pending.result()
        self.pending = None
        if dist.get_rank() == 0:  # its part ends last: it has written the list of all parts
            side, old = self.folder / "latest.part", self.folder / "latest.old"
            final = self.folder / LATEST
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                os.replace(final, old)
            os.replace(side, final)
            shutil.rmtree(old, ignore_errors=True)


def load_sharded(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read a checkpoint into tensors, whole or cut in any way.

    Raises:
        TrainingError: a checkpoint that cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, checkpoint_id=str(folder), no_dist=not dist.is_initialized())  # type: ignore[arg-type]
    except (Exception, CheckpointException) as error:  # the latter is not an Exception
        news = str(error).strip().splitlines() or [type(error).__name__]
        raise TrainingError(
            f"{folder} cannot be resumed from: {news[-1]}", hint="remove it to start afresh"
        ) from error
