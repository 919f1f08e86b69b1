"""Safetensors folders: a strict index of what lies where, before a byte is loaded.

Headers are checked by hand first (lengths, offsets, duplicate names), because a damaged file
must be refused with a clear sentence; tensors are then read by their place in the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qnext.errors import CheckpointError, DamagedFile, MissingTensor, UnexpectedTensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# safetensors itself refuses larger headers.
MAX_HEADER = 100_000_000
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2,
    "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "I16": torch.int16,
    "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
    "U32": torch.uint32, "F32": torch.float32, "I64": torch.int64, "U64": torch.uint64,
    "F64": torch.float64,
}  # fmt: skip
PIECE = 8 << 20
"""Bytes of one read."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: file, dtype in safetensors' words, shape, bytes, place in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


class SafetensorsFolder:
    """The tensors of a folder, single or sharded.

    Attributes:
        entries: name -> :class:`Entry`, in file order.
        metadata: the ``__metadata__`` of the first file.

    Raises:
        CheckpointError: no weights, a damaged file, an index that does not match the files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder")
        self.files = self._files()
        for number, file in enumerate(self.files):
            header = read_header(file)
            if number == 0:
                self.metadata = header.pop("__metadata__", None) or {}
            else:
                header.pop("__metadata__", None)
            for name, (dtype, shape, nbytes, offset) in header.items():
                if name in self.entries:
                    raise DamagedFile(
                        f"{name} is in both {self.entries[name].file.name} and {file.name}"
                    )
                self.entries[name] = Entry(file, dtype, shape, nbytes, offset)
        self._check_index()

    def _files(self) -> list[Path]:
        index, single = self.folder / INDEX, self.folder / SINGLE
        if not index.exists():
            if single.exists():
                self.weight_map: dict[str, str] | None = None
                return [single]
            stray = sorted(
                p.name for p in self.folder.glob("*") if p.suffix in (".bin", ".pt", ".pth")
            )
            raise CheckpointError(
                f"{self.folder} has neither {SINGLE} nor {INDEX}"
                + (f" (found {', '.join(stray[:3])})" if stray else ""),
                hint="only safetensors are read; pickle files can run code and are refused",
            )
        data = _json(index)
        weight_map = data.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise DamagedFile(f"{index} has no weight_map")
        self.weight_map = weight_map
        names: list[str] = []
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
                raise DamagedFile(
                    f"{index} places {tensor} in {name!r}",
                    hint="file names in an index must be plain names in the same folder",
                )
            if name not in names:
                names.append(name)
        files = [self.folder / name for name in sorted(names)]
        gone = [f.name for f in files if not f.is_file()]
        if gone:
            raise CheckpointError(
                f"{len(gone)} of {len(files)} weight files are missing: {_few(gone)}",
                hint="download the checkpoint again; finished files are kept",
            )
        return files

    def _check_index(self) -> None:
        if self.weight_map is None:
            return
        missing = [n for n in self.weight_map if n not in self.entries]
        extra = [n for n in self.entries if n not in self.weight_map]
        moved = [n for n, f in self.weight_map.items()
                 if n in self.entries and self.entries[n].file.name != f]  # fmt: skip
        if missing:
            raise MissingTensor(f"{INDEX} names tensors that no file holds: {_few(missing)}")
        if extra:
            raise UnexpectedTensor(f"files hold tensors that {INDEX} does not name: {_few(extra)}")
        if moved:
            raise DamagedFile(f"{INDEX} places tensors in the wrong file: {_few(moved)}")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(e.nbytes for e in self.entries.values())

    @contextmanager
    def opened(self) -> Iterator[Reader]:
        """A :class:`Reader` of all files; closed at the end."""
        reader = Reader(self)
        try:
            yield reader
        finally:
            reader.close()


class Reader:
    """Reads tensors of a folder; several threads may share it.

    Bytes go straight from the page cache to where they belong: no mapping whose pages would
    count as memory of the process.
    """

    def __init__(self, folder: SafetensorsFolder) -> None:
        self._entries = folder.entries
        self._files = {file: os.open(file, os.O_RDONLY) for file in folder.files}

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def into(self, name: str, target: Tensor, begin: int = 0) -> None:
        """Fill a contiguous host tensor with the bytes of an entry from ``begin`` on.

        Raises:
            DamagedFile: the file has become shorter.
            CheckpointError: it cannot be read.
        """
        entry = self._entries[name]
        octets: Any = target.detach().reshape(-1).view(torch.uint8).numpy()
        left = memoryview(octets)
        at = entry.offset + begin
        while left:
            try:
                count = os.preadv(self._files[entry.file], [left[:PIECE]], at)
            except OSError as error:
                raise CheckpointError(f"{entry.file} cannot be read: {error}") from error
            if not count:
                raise DamagedFile(f"{entry.file} ends within {name}", hint="download it again")
            at, left = at + count, left[count:]

    def tensor(self, name: str) -> Tensor:
        """One whole tensor in fresh memory."""
        entry = self._entries[name]
        target = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        self.into(name, target)
        return target


def read_header(file: Path) -> dict[str, Any]:
    """Check a safetensors header; name -> (dtype, shape, bytes, offset), plus ``__metadata__``.

    Raises:
        DamagedFile: whatever is wrong with it.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise DamagedFile(
                f"{file} is no whole safetensors file: it has {size} bytes and says that its "
                f"header takes {length}",
                hint="download it again",
            )
        raw = handle.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, giant numbers
        raise DamagedFile(f"{file} has a header that is not JSON: {error}") from error
    except _Duplicate as error:
        raise DamagedFile(f"{file} names {error.args[0]!r} twice") from error
    if not isinstance(header, dict):
        raise DamagedFile(f"{file} has a header that is not an object")
    spans: list[tuple[int, int, str]] = []
    result: dict[str, Any] = {}
    for name, info in header.items():
        if name == "__metadata__":
            if not isinstance(info, dict) or not all(isinstance(v, str) for v in info.values()):
                raise DamagedFile(f"{file}: __metadata__ must map names to strings")
            result[name] = info
            continue
        dtype, shape, begin, end = _entry(file, name, info)
        spans.append((begin, end, name))
        result[name] = (dtype, shape, end - begin, 8 + length + begin)
    _check_spans(file, spans, size - 8 - length)
    return result


def _entry(file: Path, name: str, info: Any) -> tuple[str, tuple[int, ...], int, int]:
    try:
        dtype, shape, (begin, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        counts = (*shape, begin, end)
        sane = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(f"{file}: the entry of {name} is malformed") from error
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise DamagedFile(f"{file}: {name} has the unknown dtype {dtype!r}")
    if not sane or end - begin != prod(shape) * ITEM_BYTES[dtype]:
        raise DamagedFile(
            f"{file}: {name} is {dtype} {list(shape)} but takes bytes {begin} to {end}"
        )
    return dtype, shape, begin, end


def _check_spans(file: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """The tensors must tile the data exactly: no overlap, no gap, nothing cut off."""
    at, last = 0, "the start"
    for begin, end, name in sorted(spans):
        if begin != at:
            what = "overlap" if begin < at else "leave a gap"
            raise DamagedFile(f"{file}: {last} and {name} {what}")
        at, last = end, name
    if at != size:
        raise DamagedFile(
            f"{file} is {'truncated' if at > size else 'too long'}: its tensors take {at} bytes "
            f"and it holds {size}",
            hint="download it again",
        )


class _Duplicate(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _Duplicate(key)
        result[key] = value
    return result


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is not JSON: {error}") from error
    except _Duplicate as error:
        raise DamagedFile(f"{path} names {error.args[0]!r} twice") from error
    if not isinstance(data, dict):
        raise DamagedFile(f"{path} is not a JSON object")
    return data


def _few(names: list[str], count: int = 8) -> str:
    shown = ", ".join(names[:count])
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")
