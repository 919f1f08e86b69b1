"""Which weights a folder holds, as a short name: for caches that outlive a process."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

_SAMPLE = 1 << 20
"""Bytes read at both ends of every file: the header, and the last tensors."""


def weights_id(folder: Path) -> bytes:
    """16 bytes that change with the files: names, sizes, and the beginning and end of each.

    Two files of equal size and header that differ only in the middle are not told apart; nothing
    that writes checkpoints makes such a pair.
    """
    digest = blake2b(digest_size=16)
    for path in sorted((*folder.glob("*.safetensors"), folder / "config.json")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    return digest.digest()
