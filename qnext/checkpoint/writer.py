"""Writing a folder tensor by tensor: shards of bounded size, the index at the end."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from qnext.checkpoint.reader import INDEX, SINGLE
from qnext.checkpoint.save import drop_stale, replace, write_json
from qnext.errors import CheckpointError


class ShardWriter:
    """Collects tensors and writes a shard whenever one is full.

    Files get their final names in ``finish``, when their number is known; until then the folder
    holds nothing that a reader would take for weights.

    Args:
        folder: created if needed.
        max_shard_size: bytes per file.
    """

    def __init__(self, folder: Path, max_shard_size: int) -> None:
        self.folder = folder
        self.nbytes = 0
        self._limit = max_shard_size
        self._shard: dict[str, Tensor] = {}
        self._size = 0
        self._written: list[tuple[Path, list[str]]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"could not write {folder}: {error.strerror}") from error

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it is copied to the host."""
        if self._shard and self._size + tensor.nbytes > self._limit:
            self._flush()
        self._shard[name] = tensor.detach().cpu().contiguous()
        self._size += tensor.nbytes
        self.nbytes += tensor.nbytes

    def _flush(self) -> None:
        path = self.folder / f"shard-{len(self._written)}.unfinished"
        shard = self._shard
        replace(path, lambda p: save_file(shard, p, {"format": "pt"}))
        self._written.append((path, list(shard)))
        self._shard, self._size = {}, 0

    def finish(self) -> None:
        """Write what is left, name the shards and write the index."""
        if self._shard or not self._written:
            self._flush()
        count = len(self._written)
        names = [SINGLE] if count == 1 else [
            f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
        ]  # fmt: skip
        for name, (path, _) in zip(names, self._written, strict=True):
            os.replace(path, self.folder / name)
        if count > 1:
            weight_map = {t: n for n, (_, s) in zip(names, self._written, strict=True) for t in s}
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
            write_json(self.folder / INDEX, index)
        drop_stale(self.folder, {*names, *([INDEX] if count > 1 else [])})

    def abandon(self) -> None:
        """Remove what was written so far."""
        for path, _ in self._written:
            path.unlink(missing_ok=True)
