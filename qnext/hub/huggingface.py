"""Hugging Face through `huggingface_hub`: pinned commits, shared cache, ranged retries."""

from __future__ import annotations

import glob
import os
import re
import uuid
from pathlib import Path

from qnext.errors import HubError
from qnext.hub.files import Listing, RemoteFile
from qnext.hub.names import ModelRef
from qnext.hub.progress import Meter, bar_class

verifies = False
_WORKERS = 8
# Matches no file: the client then returns the snapshot's folder without asking what is in it.
_NOTHING = "\0"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def listing(ref: ModelRef) -> Listing:
    """Files of the revision at its present commit."""
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(
        ref.name, revision=ref.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    files = []
    for entry in info.siblings or []:
        sha256 = entry.lfs.sha256 if entry.lfs else None
        files.append(
            RemoteFile(entry.rfilename, entry.size, sha256, None if sha256 else entry.blob_id)
        )
    return Listing(str(info.sha), tuple(files))


def cached(ref: ModelRef, local_dir: Path | None) -> tuple[Path, str | None]:
    """Folder and commit of a copy on this machine, found without the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if local_dir is not None:
        if not local_dir.is_dir():
            raise LocalEntryNotFoundError(f"no folder {local_dir}")
        commit = _commit_in(local_dir)
        if commit and _COMMIT.fullmatch(ref.revision or "") and ref.revision != commit:
            raise HubError(
                f"{local_dir} holds commit {commit} of {ref.name}, not {ref.revision}.",
                hint="pull once with network access, or use another local_dir",
            )
        return local_dir, commit
    folder = Path(
        snapshot_download(
            ref.name, revision=ref.revision, local_files_only=True, allow_patterns=[_NOTHING]
        )
    )
    return folder, folder.name


def _commit_in(local_dir: Path) -> str | None:
    """The commit that the client noted beside the files of a folder of the user's."""
    note = local_dir / ".cache" / "huggingface" / "download" / "config.json.metadata"
    first = note.read_text(encoding="utf-8").partition("\n")[0].strip() if note.is_file() else ""
    return first if _COMMIT.fullmatch(first) else None


def stored(ref: ModelRef, file: RemoteFile, local_dir: Path | None) -> bool:
    """Whether the cache holds these bytes already, under another revision."""
    digest = file.sha256 or file.git_sha1
    return local_dir is None and digest is not None and (_cache(ref) / "blobs" / digest).is_file()


def _cache(ref: ModelRef) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name = repo_folder_name(repo_id=ref.name, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / name


def store(local_dir: Path | None) -> Path:
    """Where the bytes will lie, to see whether there is room."""
    from huggingface_hub import constants

    return local_dir or Path(constants.HF_HUB_CACHE)


def download(
    ref: ModelRef, found: Listing, names: list[str], local_dir: Path | None, meter: Meter, have: int
) -> Path:
    """Fetch ``names`` at the listed commit; bytes go to ``meter`` on top of ``have``."""
    from huggingface_hub import snapshot_download

    with meter.stage(have, overlapping=True):
        folder = snapshot_download(
            ref.name,
            revision=found.revision,
            local_dir=local_dir,
            allow_patterns=[glob.escape(name) for name in names],
            max_workers=_WORKERS,
            tqdm_class=bar_class(meter),
        )
    return Path(folder)


def finish(ref: ModelRef, found: Listing, local_dir: Path | None) -> None:
    """Note which commit the branch or tag means, for offline use.

    The files were asked for by commit, so that a branch that moves meanwhile changes nothing; the
    client notes a name only when it is asked by name. `refs/` is part of its documented layout.
    """
    from huggingface_hub import constants

    name = ref.revision or constants.DEFAULT_REVISION
    if local_dir is not None or name == found.revision:
        return
    path = _cache(ref) / "refs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    fresh.write_text(found.revision, encoding="utf-8")
    os.replace(fresh, path)
