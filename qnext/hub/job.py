"""One pull from one hub: list, choose, fetch in two stages, check what came."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from qnext.errors import HubError
from qnext.hub.failures import explain, is_unreachable
from qnext.hub.files import (
    Listing,
    RemoteFile,
    check_complete,
    damage,
    is_weights,
    local_files,
    select,
    shards_of,
)
from qnext.hub.names import ModelRef
from qnext.hub.progress import Meter, Progress, as_progress, size_text

logger = logging.getLogger(__name__)

_HASH_THREADS = 4
_TRIES = 5
_PAUSE_SECONDS = 1.0


class Hub(Protocol):
    """What `huggingface.py`, `modelscope.py` and `kaggle.py` offer."""

    verifies: bool

    def listing(self, ref: ModelRef) -> Listing: ...  # noqa: D102
    def cached(self, ref: ModelRef, local_dir: Path | None) -> tuple[Path, str | None]: ...  # noqa: D102
    def stored(self, ref: ModelRef, file: RemoteFile, local_dir: Path | None) -> bool: ...  # noqa: D102
    def store(self, local_dir: Path | None) -> Path | None: ...  # noqa: D102
    def download(  # noqa: D102
        self,
        ref: ModelRef,
        found: Listing,
        names: list[str],
        local_dir: Path | None,
        meter: Meter,
        have: int,
    ) -> Path: ...
    def finish(self, ref: ModelRef, found: Listing, local_dir: Path | None) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class PullResult:
    """A model folder on this machine.

    Attributes:
        path: the folder.
        files: names of the model's files in it that were asked for.
        bytes: their size.
        revision: commit (Hugging Face), revision name (ModelScope) or version (Kaggle) that lies
            there; None where it is not known.
    """

    path: Path
    files: tuple[str, ...]
    bytes: int
    revision: str | None


@dataclass(frozen=True)
class Job:
    """One pull from one hub."""

    hub: Hub
    ref: ModelRef
    local_dir: Path | None
    allow_patterns: Sequence[str] | None
    mtp_only: bool

    def here(self) -> PullResult:
        """The copy on this machine."""
        folder, revision = self.hub.cached(self.ref, self.local_dir)
        check_complete(
            folder, str(self.ref), mtp_only=self.mtp_only, allow_patterns=self.allow_patterns
        )
        return result_of(folder, local_files(folder, self.allow_patterns), revision)

    def online(self, progress: bool | Progress) -> PullResult:
        """What the hub has, or the copy on this machine when it gives no answer."""
        try:
            found = self.hub.listing(self.ref)
        except Exception as error:
            if not is_unreachable(error):
                raise
            try:
                result = self.here()
            except HubError:
                raise
            except Exception:
                raise explain(error, self.ref) from error
            logger.warning(
                "%s gave no answer; using the copy of %s in %s",
                self.ref.title,
                self.ref,
                result.path,
            )
            return result
        shown = as_progress(progress)
        try:
            return self._fetch(found, shown)
        finally:
            shown.finish()

    def _fetch(self, found: Listing, progress: Progress) -> PullResult:
        files = select(found.files, self.allow_patterns)
        small = [file for file in files if not is_weights(file.name)]
        weights = [file for file in files if is_weights(file.name)]
        if not files or (self.allow_patterns is None and not weights):
            kind = "safetensors" if self.allow_patterns is None else "matching"
            others = ", ".join(sorted(file.name for file in found.files)[:4]) or "nothing"
            raise HubError(
                f"{self.ref} has no {kind} files (it holds {others}).",
                hint="qnext reads safetensors only; look for a converted copy",
            )
        before = _stamps(self._folder(found), files)
        # The small files come first: the index among them says which shards are wanted.
        folder = None
        if small:
            folder = self._stage(found, small, small if self.mtp_only else files, progress)
            if self.mtp_only:
                shards = shards_of(folder, mtp_only=True)
                weights = [w for w in weights if shards is None or w.name in shards]
        if weights:
            folder = self._stage(found, weights, small + weights, progress)
        if folder is None:
            raise HubError(f"{self.ref} has nothing to fetch.", hint="widen allow_patterns")
        wanted = small + weights
        self._verify(folder, wanted, before)
        if self.allow_patterns is None:
            check_complete(folder, str(self.ref), mtp_only=self.mtp_only, allow_patterns=None)
        self.hub.finish(self.ref, found, self.local_dir)
        return result_of(folder, wanted, found.revision)

    def _folder(self, found: Listing) -> Path | None:
        """Where files of this very revision lie already."""
        if self.local_dir is not None:
            return self.local_dir
        with suppress(Exception):
            return self.hub.cached(replace(self.ref, revision=found.revision), None)[0]
        return None

    def _stage(
        self, found: Listing, files: list[RemoteFile], every: list[RemoteFile], progress: Progress
    ) -> Path:
        """Fetch ``files``; ``every`` file of the pull sets the total of the progress."""
        total = sum(file.size or 0 for file in every)
        self._need_room(total - self._have(self._folder(found), every))
        progress.start(str(self.ref), len(every), total)
        meter = Meter(progress, total)
        names = [file.name for file in files]
        have = reached = self._have(self._folder(found), every)
        tries = 1
        while True:
            try:
                folder = self.hub.download(self.ref, found, names, self.local_dir, meter, have)
            except Exception as error:
                # Clients differ in what they try again; a try that brought nothing is the last.
                if tries == _TRIES or meter.done <= reached or not is_unreachable(error):
                    raise
                logger.warning("%s: the connection broke; resuming", self.ref)
                tries, reached = tries + 1, meter.done
                time.sleep(_PAUSE_SECONDS)
                have = self._have(self._folder(found), every)
            else:
                meter.set(self._have(folder, every))
                return folder

    def _have(self, folder: Path | None, files: list[RemoteFile]) -> int:
        """Bytes of ``files`` that are on this machine already."""
        sizes = {name: stamp[0] for name, stamp in _stamps(folder, files).items()}
        return sum(
            file.size or 0
            for file in files
            if sizes.get(file.name) == file.size or self.hub.stored(self.ref, file, self.local_dir)
        )

    def _need_room(self, count: int) -> None:
        place = self.hub.store(self.local_dir)
        while place is not None and not place.exists():
            place = place.parent if place.parent != place else None
        if place is None:
            return
        free = shutil.disk_usage(place).free
        if count > free:
            raise HubError(
                f"{self.ref} needs {size_text(count)} more, "
                f"and {place} has {size_text(free)} free.",
                hint="free some space, or give local_dir on a larger disk",
            )

    def _verify(
        self, folder: Path, files: list[RemoteFile], before: dict[str, tuple[int, int]]
    ) -> None:
        """Check sizes, and hashes of what came now unless the client did; drop what is damaged."""
        after = _stamps(folder, files)

        def check(file: RemoteFile) -> str | None:
            fresh = after.get(file.name) != before.get(file.name)
            return damage(folder / file.name, file, hashes=fresh and not self.hub.verifies)

        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            faults = {
                f.name: why for f, why in zip(files, pool.map(check, files), strict=True) if why
            }
        for name in faults:
            path = folder / name
            # In a cache of links the bytes lie elsewhere.
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        if faults:
            name, why = next(iter(faults.items()))
            raise HubError(
                f"{len(faults)} file(s) of {self.ref} arrived damaged: {name} ({why}).",
                hint="they were removed; run the same command again: finished files are kept",
            )


def _stamps(folder: Path | None, files: Sequence[RemoteFile]) -> dict[str, tuple[int, int]]:
    """Size and time of change of the files that exist in ``folder``."""
    stamps = {}
    for file in files:
        path = None if folder is None else folder / file.name
        if path is not None and path.is_file():
            stat = path.stat()
            stamps[file.name] = (stat.st_size, stat.st_mtime_ns)
    return stamps


def result_of(folder: Path, files: Sequence[RemoteFile], revision: str | None) -> PullResult:
    """The result for ``files`` that lie in ``folder``."""
    names = tuple(file.name for file in files)
    return PullResult(folder, names, sum((folder / n).stat().st_size for n in names), revision)
