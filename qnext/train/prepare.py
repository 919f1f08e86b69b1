"""``qnext data prepare``: files or hub data sets, tokenised once into memory-mapped shards."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Generator
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import IO, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import Tokenizer

from qnext.errors import ConfigError, TrainingError
from qnext.train.recipe import read_recipe, write_recipe
from qnext.train.records import TextSource, read_records

log = logging.getLogger(__name__)
SPLITS = ("train", "heldout")
_BATCH = 256
_NEWS = 100_000


class DataRecipe(BaseModel):
    """What to tokenise, with what, and where to.

    A file looks so::

        output = "runs/data"
        tokenizer = "runs/corpus/tokenizer"

        [[source]]
        name = "books"
        files = ["books/*.jsonl.gz"]
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: str
    tokenizer: str
    """Folder with ``tokenizer.json``."""
    end_of_text: str = "<|endoftext|>"
    """Token that closes every document."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    """A record without text ends the work, or is counted and left out."""
    heldout_share: float = Field(default=0.01, ge=0, lt=1)
    """Share of the documents that is kept for evaluation, chosen by a hash of their text."""
    source: tuple[TextSource, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> DataRecipe:
        names = [s.name for s in self.source]
        if len(set(names)) < len(names):
            raise ValueError(f"source names must differ, these do not: {', '.join(names)}")
        return self


def prepare_shards(recipe: Path, overrides: list[str]) -> list[Path]:
    """Tokenise every source of a recipe that is not there yet.

    Returns:
        One folder of shards per source.

    Raises:
        ConfigError: a bad recipe or tokenizer.
        TrainingError: missing files, or a bad record that the recipe does not let pass.
    """
    config = read_recipe(DataRecipe, recipe, overrides)
    tokenizer, digest = _tokenizer(config)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "data.toml").write_text(write_recipe(config), encoding="utf-8")
    folders = []
    for source in config.source:
        asked = {
            "source": source.model_dump(mode="json"), "tokenizer": digest,
            "end_of_text": config.end_of_text, "heldout_share": config.heldout_share,
        }  # fmt: skip
        folder = output / source.name
        if not _is_done(folder, asked):
            _write(config, source, tokenizer, folder, asked)
        folders.append(folder)
    return folders


def _tokenizer(config: DataRecipe) -> tuple[Tokenizer, str]:
    file = Path(config.tokenizer) / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"tokenizer: {file} does not exist")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare exceptions
        raise ConfigError(f"tokenizer: {file} cannot be read: {error}") from error
    if tokenizer.token_to_id(config.end_of_text) is None:
        raise ConfigError(
            f"{file} has no token {config.end_of_text}",
            hint="set end_of_text to the token that ends a document",
        )
    # Text that looks like a special token is text.
    tokenizer.encode_special_tokens = True
    return tokenizer, hashlib.sha256(file.read_bytes()).hexdigest()


def _is_done(folder: Path, asked: dict[str, object]) -> bool:
    """Whether a finished folder was made from the same question."""
    file = folder / "manifest.json"
    if not file.is_file():
        return False
    if json.loads(file.read_text(encoding="utf-8")).get("asked") == asked:
        log.info("%s: already there", folder)
        return True
    raise ConfigError(
        f"{folder} was made by another recipe or tokenizer",
        hint="choose another output or source name, or remove the folder",
    )


class _Shard:
    """One split being written."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype) -> None:
        self.dtype, self.split, self.folder = dtype, split, folder
        self.file: IO[bytes] = (folder / f"{split}.bin").open("wb")
        self.offsets, self.bytes = [0], 0

    def add(self, ids: list[int], size: int) -> None:
        self.file.write(np.asarray(ids, dtype=self.dtype).tobytes())
        self.offsets.append(self.offsets[-1] + len(ids))
        self.bytes += size

    def finish(self) -> dict[str, int]:
        np.save(self.folder / f"{self.split}.offsets.npy", np.asarray(self.offsets, np.int64))
        return {
            "documents": len(self.offsets) - 1, "tokens": self.offsets[-1], "bytes": self.bytes
        }  # fmt: skip


def _write(
    config: DataRecipe,
    source: TextSource,
    tokenizer: Tokenizer,
    folder: Path,
    asked: dict[str, object],
) -> None:
    """Tokenise one source to the side, then put it in place by a rename."""
    side = folder.with_name(folder.name + ".part")
    shutil.rmtree(side, ignore_errors=True)
    side.mkdir(parents=True)
    # Ids of added tokens may lie beyond the vocabulary's size.
    wide = max(tokenizer.get_vocab(with_added_tokens=True).values()) >= 1 << 16
    dtype = np.dtype("<u4" if wide else "<u2")
    end = int(tokenizer.token_to_id(config.end_of_text) or 0)  # there: _tokenizer has looked
    shards = {split: _Shard(side, split, dtype) for split in SPLITS}
    skipped: list[str] = []
    done = 0
    with ExitStack() as stack:
        for shard in shards.values():
            stack.enter_context(shard.file)
        texts = stack.enter_context(closing(_good_texts(config, source, skipped)))
        while batch := list(islice(texts, _BATCH)):
            for text, encoding in zip(batch, tokenizer.encode_batch_fast(batch), strict=True):
                split = "heldout" if _chance(text) < config.heldout_share else "train"
                shards[split].add([*encoding.ids, end], len(text.encode()))
            done += len(batch)
            if done % _NEWS < len(batch):
                log.info("%s: %d documents, %d skipped", source.name, done, len(skipped))
    manifest = {
        "dtype": "uint32" if wide else "uint16",
        **{split: shard.finish() for split, shard in shards.items()},
        "skipped": len(skipped),
        "asked": asked,
    }
    if not shards["train"].offsets[1:]:
        raise TrainingError(f"source {source.name} has no documents to train on")
    (side / "skipped.txt").write_text("".join(f"{s}\n" for s in skipped), encoding="utf-8")
    (side / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(side, folder)
    log.info("%s: %d documents, %d skipped", folder, done, len(skipped))


def _good_texts(
    config: DataRecipe, source: TextSource, skipped: list[str]
) -> Generator[str, None, None]:
    """The texts; a bad record raises or is noted, as the recipe says."""
    taken = 0
    for record in read_records(source):
        if record.fault is not None:
            news = f"{record.where}: {record.fault}"
            if config.on_bad_record == "fail":
                raise TrainingError(news, hint='on_bad_record = "skip" leaves such records out')
            skipped.append(news)
            continue
        yield record.text
        taken += 1
        if taken == source.max_documents:
            return


def _chance(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
