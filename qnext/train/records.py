"""Texts out of files and hub data sets, one document at a time; what is wrong is named by line.

Local jsonl, parquet and text files are read directly, because only then a bad record can be named
by file and line; hub data sets (and folders laid out like one) are streamed through ``datasets``.
"""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qnext.errors import TrainingError

Format = Literal["jsonl", "parquet", "text"]
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet",
    ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip


class TextSource(BaseModel):
    """One ``[[source]]`` of a data recipe: local ``files`` or a hub ``dataset``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of its shards under the output."""
    files: tuple[str, ...] = ()
    """Globs of local files: .jsonl, .parquet, .txt, each also as .gz."""
    format: Literal["auto", "jsonl", "parquet", "text"] = "auto"
    dataset: str | None = None
    """Hub data set, or a local folder laid out like one; streamed."""
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_key: str = "text"
    """Field that holds the text of a record."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """What a record of a text file is."""
    max_documents: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_origin(self) -> TextSource:
        if bool(self.files) == bool(self.dataset):
            raise ValueError("give either files or dataset")
        return self


@dataclass(frozen=True)
class Record:
    """One record: its text, or what is wrong with it.

    Attributes:
        where: ``file:line`` or the like.
        text: the document, if it is a good one.
        fault: one sentence, if it is not.
    """

    where: str
    text: str = ""
    fault: str | None = None


def read_records(source: TextSource) -> Iterator[Record]:
    """Every record of a source, in a fixed order.

    Raises:
        TrainingError: no such files, an unknown format, a data set that cannot be read.
    """
    if source.dataset is not None:
        yield from _hub(source)
        return
    for path in _paths(source):
        kind = _kind(path, source.format)
        reader = {"jsonl": _jsonl, "parquet": _parquet, "text": _text}[kind]
        yield from reader(path, source)


def _paths(source: TextSource) -> list[Path]:
    found: list[Path] = []
    for pattern in source.files:
        hits = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
        if not hits:
            raise TrainingError(f"source {source.name}: no file matches {pattern}")
        found += [p for p in hits if p not in found]
    return found


def _kind(path: Path, asked: str) -> Format:
    if asked != "auto":
        return asked  # type: ignore[return-value]
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix.lower() not in _SUFFIXES:
        raise TrainingError(
            f"{path}: the format of {suffix or 'a file without suffix'} is not known",
            hint="say format = 'jsonl', 'parquet' or 'text' in the source",
        )
    return _SUFFIXES[suffix.lower()]


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _judge(where: str, value: Any, key: str) -> Record:
    """A record from the value of its text field."""
    if not isinstance(value, str):
        kind = "missing" if value is None else f"{type(value).__name__}, not text"
        return Record(where, fault=f"field {key!r} is {kind}")
    if not value.strip():
        return Record(where, fault=f"field {key!r} is empty")
    return Record(where, value)


def _jsonl(path: Path, source: TextSource) -> Iterator[Record]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                yield Record(where, fault="the line is empty")
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                yield Record(where, fault=f"not UTF-8 ({error.reason} at byte {error.start})")
                continue
            except json.JSONDecodeError as error:
                yield Record(where, fault=f"not JSON ({error.msg}, column {error.colno})")
                continue
            if not isinstance(row, dict):
                yield Record(where, fault=f"a JSON {type(row).__name__}, not an object")
                continue
            yield _judge(where, row.get(source.text_key), source.text_key)


def _parquet(path: Path, source: TextSource) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise TrainingError(f"{path} is not a parquet file: {error}") from error
    names = file.schema_arrow.names
    if source.text_key not in names:
        raise TrainingError(
            f"{path} has no column {source.text_key!r}; it has {', '.join(names)}",
            hint="set text_key in the source",
        )
    number = 0
    for batch in file.iter_batches(columns=[source.text_key]):
        for value in batch.column(0).to_pylist():
            number += 1
            yield _judge(f"{path}:row {number}", value, source.text_key)


def _text(path: Path, source: TextSource) -> Iterator[Record]:
    if source.sample_by == "line":
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                yield _decode(f"{path}:{number}", line.rstrip(b"\r\n"))
        return
    if source.sample_by == "paragraph":
        yield from _paragraphs(path)
        return
    with _open(path) as file:
        yield _decode(f"{path}:1", file.read())


def _paragraphs(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        start = 1
        lines: list[bytes] = []
        for number, line in enumerate(file, 1):
            if line.strip():
                start = start if lines else number
                lines.append(line)
            elif lines:
                yield _decode(f"{path}:{start}", b"".join(lines).rstrip(b"\r\n"))
                lines = []
        if lines:
            yield _decode(f"{path}:{start}", b"".join(lines).rstrip(b"\r\n"))


def _decode(where: str, data: bytes) -> Record:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return Record(where, fault=f"not UTF-8 ({error.reason} at byte {error.start})")
    return Record(where, text) if text.strip() else Record(where, fault="the text is empty")


def _hub(source: TextSource) -> Iterator[Record]:
    import datasets

    name = str(source.dataset)
    try:
        rows = datasets.load_dataset(
            name, source.subset, split=source.split, revision=source.revision, streaming=True
        )
        for number, row in enumerate(rows, 1):
            if number == 1 and source.text_key not in row:
                raise TrainingError(
                    f"data set {name} has no field {source.text_key!r}; it has {', '.join(row)}",
                    hint="set text_key in the source",
                )
            where = f"{name}[{source.split}]:row {number}"
            yield _judge(where, row.get(source.text_key), source.text_key)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise TrainingError(
            f"data set {name} cannot be read: {str(error).splitlines()[0]}",
            hint="check the name, subset, split and revision, and the network",
        ) from error
