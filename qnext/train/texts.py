"""Texts to score: shards from disk, or files that are tokenised on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qnext.errors import TrainingError
from qnext.text import Tokenizer
from qnext.train.data import Documents, TokenShards
from qnext.train.records import TextSource, read_records


class TokenLists:
    """Documents in memory.

    Attributes:
        num_bytes: UTF-8 bytes of all texts.
    """

    def __init__(self, documents: Sequence[Sequence[int]], num_bytes: int) -> None:
        self.documents = [np.asarray(ids, dtype=np.int64) for ids in documents]
        self.num_bytes = num_bytes

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document."""
        return self.documents[index]

    def __len__(self) -> int:
        return len(self.documents)


def gather(
    model: Path, shards: Sequence[str], files: Sequence[str], text_key: str, vocab_size: int
) -> list[Documents]:
    """Everything to score, checked against the model's vocabulary.

    Args:
        model: folder with the tokenizer, used for files only.
        shards: folders; the held-out split counts.
        files: globs of jsonl, parquet and text files.
        text_key: field of their records.
        vocab_size: of the model.

    Raises:
        TrainingError: shards of another vocabulary, missing files or bad records.
    """
    parts: list[Documents] = []
    for folder in shards:
        split = TokenShards(folder, "heldout")
        largest = int(split.tokens.max(initial=0))
        if largest >= vocab_size:
            raise TrainingError(
                f"{folder} holds token {largest}, the model's vocabulary ends at {vocab_size - 1}",
                hint="these shards were made with another tokenizer",
            )
        parts.append(split)
    if files:
        tokenizer = Tokenizer.from_pretrained(model)
        end = tokenizer.eos_token_id
        documents, size = [], 0
        for record in read_records(TextSource(name="texts", files=tuple(files), text_key=text_key)):
            if record.fault is not None:
                raise TrainingError(f"{record.where}: {record.fault}")
            documents.append([*tokenizer.encode(record.text), *([end] if end is not None else [])])
            size += len(record.text.encode())
        parts.append(TokenLists(documents, size))
    return parts
