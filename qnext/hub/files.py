"""Which files of a repository are fetched, and whether a folder holds a whole model."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qnext.errors import HubError

ALLOWED = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.jinja",
    "*README.md",
    "*LICENSE",
    "*LICENSE.md",
    "*NOTICE",
)
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class RemoteFile:
    """One file of a listing; ``size`` in bytes, hashes in hex where the hub tells them."""

    name: str
    size: int | None
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True)
class Listing:
    """The files of one revision; ``revision`` is as exact as the hub says (commit or version)."""

    revision: str
    files: tuple[RemoteFile, ...]


def select(files: Iterable[RemoteFile], allow_patterns: Sequence[str] | None) -> list[RemoteFile]:
    """Files that may be fetched: weights, configs, tokenizer, template, card and licence.

    ``allow_patterns`` (shell globs) narrows this and can never widen it, so pickles and code stay
    away. Names that would leave the folder are refused.

    Raises:
        HubError: a listed name is absolute or climbs with ``..``.
    """
    chosen = []
    for file in files:
        if not _matches(file.name, ALLOWED):
            continue
        path = PurePosixPath(file.name)
        if path.is_absolute() or ".." in path.parts or "\\" in file.name or ":" in file.name:
            raise HubError(
                f"The repository lists the unsafe file name {file.name!r}.",
                hint="do not use this repository",
            )
        if allow_patterns is None or _matches(file.name, allow_patterns):
            chosen.append(file)
    return chosen


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_weights(name: str) -> bool:
    """Whether this is a shard (everything else is small and fetched first)."""
    return name.endswith(".safetensors")


def shards_of(folder: Path, *, mtp_only: bool = False) -> set[str] | None:
    """Names of the shards that the index of ``folder`` lists; None without an index.

    ``mtp_only`` keeps the shards that hold ``mtp.*`` (in the published checkpoints one of 41).

    Raises:
        HubError: the index cannot be read, or holds no ``mtp.*`` though that was asked.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = {
            str(shard)
            for name, shard in weight_map.items()
            if not mtp_only or name.startswith("mtp.")
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(
            f"{path} is not an index of weights.", hint="remove it and pull again"
        ) from error
    if mtp_only and not shards:
        raise HubError(
            f"The index {path} lists no mtp.* tensors.",
            hint="this model has no MTP module; pull it whole",
        )
    return shards


def check_complete(
    folder: Path, what: str, *, mtp_only: bool, allow_patterns: Sequence[str] | None
) -> None:
    """Raise unless ``folder`` (found without the network) holds what was asked for.

    Raises:
        HubError: a file of the model is missing.
    """
    shards = shards_of(folder, mtp_only=mtp_only)
    if allow_patterns is not None:
        missing = [] if local_files(folder, allow_patterns) else [", ".join(allow_patterns)]
    else:
        missing = [] if (folder / "config.json").is_file() else ["config.json"]
        if shards is None and not any(folder.glob("*.safetensors")):
            missing.append("*.safetensors")
        missing += sorted(name for name in shards or () if not (folder / name).is_file())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise HubError(
            f"The local copy of {what} in {folder} is incomplete: it lacks {missing[0]}{more}.",
            hint="pull it once with network access; finished files are kept",
        )


def local_files(
    folder: Path, allow_patterns: Sequence[str] | None = None
) -> tuple[RemoteFile, ...]:
    """The fetchable files that lie in ``folder``, with their sizes in bytes."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        # Hidden folders are the clients' own book-keeping.
        if path.is_file() and not any(part.startswith(".") for part in name.parts[:-1]):
            found.append(RemoteFile(name.as_posix(), path.stat().st_size))
    return tuple(select(found, allow_patterns))


def damage(path: Path, expected: RemoteFile, *, hashes: bool) -> str | None:
    """Why ``path`` is not the listed file, or None. ``hashes`` reads the whole file."""
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        return "missing"
    if expected.size is not None and size != expected.size:
        return f"{size} bytes instead of {expected.size}"
    if not hashes:
        return None
    if expected.sha256 is not None:
        return None if _digest(path, hashlib.sha256) == expected.sha256 else "wrong SHA-256"
    if expected.git_sha1 is not None:
        # Git's name of a blob: SHA-1 over a header and the content.
        header = f"blob {size}\0".encode()
        return None if _digest(path, lambda: _sha1(header)) == expected.git_sha1 else "wrong SHA-1"
    return None


def _sha1(start: bytes) -> hashlib._Hash:
    return hashlib.sha1(start, usedforsecurity=False)


def _digest(path: Path, new: Callable[[], hashlib._Hash]) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, new).hexdigest()
