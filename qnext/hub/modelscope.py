"""ModelScope through `modelscope`: any revision, resume by range, SHA-256 checked."""

from __future__ import annotations

from pathlib import Path

from qnext.hub.failures import import_client
from qnext.hub.files import Listing, RemoteFile
from qnext.hub.names import ModelRef
from qnext.hub.progress import Meter, bar_class, replaced

verifies = True
_BRANCH = "master"
_WORKERS = 4


def listing(ref: ModelRef) -> Listing:
    """Files of the revision; the client does not tell the commit behind a branch."""
    api = import_client("modelscope.hub.api", ref).HubApi()
    revision = ref.revision or _BRANCH
    entries = api.get_model_files(ref.name, revision=revision, recursive=True)
    # Folders are listed too, and an unknown size reads 0.
    files = [RemoteFile(entry["Path"], int(entry.get("Size") or 0) or None) for entry in entries]
    return Listing(revision, tuple(files))


def cached(ref: ModelRef, local_dir: Path | None) -> tuple[Path, str | None]:
    """Folder and revision of a copy on this machine, found without the network."""
    snapshot = import_client("modelscope.hub.snapshot_download", ref)
    folder = snapshot.snapshot_download(
        ref.name,
        revision=ref.revision,
        local_files_only=True,
        local_dir=None if local_dir is None else str(local_dir),
    )
    return Path(folder), ref.revision or _BRANCH


def stored(ref: ModelRef, file: RemoteFile, local_dir: Path | None) -> bool:
    """No: the client shares nothing between revisions."""
    return False


def store(local_dir: Path | None) -> Path | None:
    """Where the bytes will lie; the client does not tell its cache folder."""
    return local_dir


def download(
    ref: ModelRef, found: Listing, names: list[str], local_dir: Path | None, meter: Meter, have: int
) -> Path:
    """Fetch ``names`` at the listed revision; bytes go to ``meter`` on top of ``have``."""
    snapshot = import_client("modelscope.hub.snapshot_download", ref)
    callback = import_client("modelscope.hub.callback", ref)

    class Report(callback.ProgressCallback):  # type: ignore[misc, name-defined]
        def __init__(self, filename: str, file_size: int) -> None:
            super().__init__(filename, file_size)
            self._done = 0

        def update(self, size: int) -> None:
            self._done += size
            meter.report(id(self), self._done)

    with (
        meter.stage(have, overlapping=False),
        # Its own bars have no switch.
        replaced("modelscope_hub._download", "tqdm", bar_class(None)),
    ):
        folder = snapshot.snapshot_download(
            ref.name,
            revision=found.revision,
            local_dir=None if local_dir is None else str(local_dir),
            allow_patterns=names,
            max_workers=_WORKERS,
            progress_callbacks=[Report],
        )
    return Path(folder)


def finish(ref: ModelRef, found: Listing, local_dir: Path | None) -> None:
    """Nothing to note: the client's cache is by revision name."""
