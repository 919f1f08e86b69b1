"""DiskTier: entries as safetensors files that outlive the process.

A file is written to the side and renamed, so that it is whole or not there; its metadata says what
it is, whose, and the SHA-256 of its tensors. What does not agree is deleted and was never there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from qnext.engine.cache.tensors import Tensors
from qnext.engine.cache.tiers import Named, Names, TierStats, nbytes_of
from qnext.errors import ConfigError

log = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_NAME = re.compile(r"[0-9a-f]{64}(-[0-9]+-[0-9a-f]{64})?")
_STALE_SECONDS = 3600.0
"""Half-written files of that age belong to nobody any more."""
_REFRESH_SECONDS = 2.0
"""The folder is read again at most that often."""


class DiskTier:
    """Entries in one folder, shared by processes and surviving them.

    Writing happens behind the caller's back in a thread. Several processes may use the folder: each
    keeps it within its own bound, and an entry that another one deleted is a miss.

    Args:
        folder: made if missing; files in it that are not the tier's are left alone.
        max_bytes: most bytes of files; the least recently used ones are deleted.
        fingerprint: the cache's; files with another one are not used.
        queue_bytes: most bytes that wait to be written; what comes on top is not stored.
        min_tokens: see ``Tier``.

    Raises:
        ConfigError: the folder cannot be made or written.
    """

    def __init__(
        self,
        folder: str | Path,
        max_bytes: int,
        *,
        fingerprint: bytes,
        queue_bytes: int = 1 << 30,
        min_tokens: int = 64,
    ) -> None:
        if max_bytes < 1:
            raise ConfigError(f"a disk tier of {max_bytes} bytes holds nothing")
        self.folder, self.max_bytes, self.min_tokens = Path(folder), max_bytes, min_tokens
        self.stats = TierStats()
        self._fingerprint = hashlib.sha256(fingerprint).hexdigest()
        self._queue_bytes = queue_bytes
        self._files: OrderedDict[str, int] = OrderedDict()
        self._names = Names()
        self._pending: OrderedDict[str, Tensors] = OrderedDict()
        self._pending_bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._writer: threading.Thread | None = None
        self._seen = (0, 0.0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self._beside("probe")
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"the cache folder {self.folder} cannot be written: {error}",
                hint="name a folder on a local disk, or leave the disk tier away",
            ) from error
        with self._changed:
            self._scan()
            self._make_room()

    def get(self, name: str) -> Tensors | None:
        """See ``Tier``; a damaged, truncated or foreign file is deleted and a miss."""
        with self._changed:
            waiting = self._pending.get(name)
            known = name in self._files
        if waiting is not None:
            self.stats.hits += 1
            return waiting
        if not known:
            return None
        path = self._path(name)
        try:
            tensors = self._verified(name, path.read_bytes())
        except FileNotFoundError:
            self._forget(name)
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            log.warning("cache file deleted path=%s error=%s", path, error)
            self.stats.damaged += 1
            self.remove(name)
            return None
        self.stats.hits += 1
        with self._changed:
            if name in self._files:
                self._files.move_to_end(name)
        with suppress(OSError):
            os.utime(path)
        return tensors

    def put(self, name: str, tensors: Tensors, *, wait: bool = False) -> list[Named]:
        """See ``Tier``; returns at once unless ``wait`` finds the queue full."""
        size = nbytes_of(tensors)
        with self._changed:
            if name in self._files or name in self._pending:
                return []
            while wait and self._pending and self._pending_bytes + size > self._queue_bytes:
                self._changed.wait()
            full = self._pending and self._pending_bytes + size > self._queue_bytes
            if full or size > self.max_bytes:
                self.stats.refused += 1
                return []
            self._pending[name] = tensors
            self._pending_bytes += size
            self._names.add(name)
            if self._writer is None or not self._writer.is_alive():
                self._closing = False
                self._writer = threading.Thread(target=self._write, name="cache", daemon=True)
                self._writer.start()
            self._changed.notify_all()
        return []

    def contains(self, name: str) -> bool:
        """See ``Tier``."""
        with self._changed:
            return name in self._files or name in self._pending

    def states_of(self, block: str) -> Collection[str]:
        """See ``Tier``."""
        with self._changed:
            return self._names.states_of(block)

    def remove(self, name: str) -> None:
        """See ``Tier``."""
        with self._changed:
            waiting = self._pending.pop(name, None)
            if waiting is not None:
                self._pending_bytes -= nbytes_of(waiting)
                self._changed.notify_all()
        self._forget(name)
        with suppress(OSError):
            self._path(name).unlink()

    def refresh(self) -> None:
        """See ``Tier``."""
        stamp, at = self._seen
        now = time.monotonic()
        if now - at < _REFRESH_SECONDS:
            return
        with suppress(OSError):
            if self.folder.stat().st_mtime_ns != stamp:
                with self._changed:
                    self._scan()
                return
        self._seen = (stamp, now)

    def drain(self) -> Iterator[Named]:
        """Nothing is lost with the process."""
        return iter(())

    def flush(self) -> None:
        """Wait until everything is written."""
        with self._changed:
            while self._pending:
                self._changed.wait()

    def close(self) -> None:
        """Write what waits and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    # ------------------------------------------------------------ the writer's thread

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._pending:
                    if self._closing:
                        return
                    self._changed.wait()
                name, tensors = next(iter(self._pending.items()))
            size = 0
            try:
                size = self._store(name, tensors)
            except Exception as error:  # a full disk must not end the thread, nor the engine
                log.warning("cache file not written name=%s error=%s", name, error)
            with self._changed:
                kept = self._pending.pop(name, None) is not None
                if kept:
                    self._pending_bytes -= nbytes_of(tensors)
                if kept and size:
                    self._note(name, size)
                    self.stats.stored += 1
                    self._make_room()
                else:
                    self.stats.refused += kept
                    self._names.discard(name)
                self._changed.notify_all()
            if size and not kept:  # removed meanwhile
                with suppress(OSError):
                    self._path(name).unlink()

    def _store(self, name: str, tensors: Tensors) -> int:
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        metadata = {"name": name, "fingerprint": self._fingerprint, "sha256": digest(tensors)}
        data = save(tensors, metadata)
        beside = self._beside(name[:16])
        try:
            beside.write_bytes(data)
            beside.replace(self._path(name))
        except OSError:
            with suppress(OSError):
                beside.unlink()
            raise
        return len(data)

    # ------------------------------------------------------------ files

    def _verified(self, name: str, data: bytes) -> Tensors:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        metadata = header["__metadata__"]
        for key, wanted in (("name", name), ("fingerprint", self._fingerprint)):
            if metadata[key] != wanted:
                raise ValueError(f"{key} is {metadata[key]}")
        tensors: Tensors = load(data)
        if digest(tensors) != metadata["sha256"]:
            raise ValueError("the checksum does not agree")
        return tensors

    def _scan(self) -> None:
        """Read the folder anew; what is known keeps its place in the order of use."""
        found: list[tuple[float, str, int]] = []
        with suppress(OSError):
            stamp = self.folder.stat().st_mtime_ns
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    name = entry.name.removesuffix(_SUFFIX)
                    with suppress(OSError):
                        stat = entry.stat()
                        if name != entry.name and _NAME.fullmatch(name):
                            found.append((stat.st_mtime, name, stat.st_size))
                        elif _left_over(entry.name, stat.st_mtime):
                            Path(entry.path).unlink()
            self._seen = (stamp, time.monotonic())
        there = {name for _, name, _ in found}
        for name in [name for name in self._files if name not in there]:
            self._forget(name)
        for _, name, size in sorted(found):
            if name not in self._files:
                self._note(name, size)

    def _note(self, name: str, size: int) -> None:
        self.stats.nbytes += size - self._files.get(name, 0)
        self._files[name] = size
        self.stats.entries = len(self._files)
        self._names.add(name)

    def _forget(self, name: str) -> None:
        with self._changed:
            self.stats.nbytes -= self._files.pop(name, 0)
            self.stats.entries = len(self._files)
            if name not in self._pending:
                self._names.discard(name)

    def _make_room(self) -> None:
        while self.stats.nbytes > self.max_bytes and self._files:
            name = next(iter(self._files))
            self._forget(name)
            self.stats.evicted += 1
            with suppress(OSError):
                self._path(name).unlink()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"

    def _beside(self, name: str) -> Path:
        # Random: containers that share a folder may all be process 1.
        return self.folder / f".{name}-{uuid4().hex}.part"


def _left_over(name: str, modified: float) -> bool:
    old = time.time() - modified > _STALE_SECONDS
    return old and name.startswith(".") and name.endswith(".part")


def digest(tensors: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
