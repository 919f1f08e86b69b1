"""A byte-level BPE like Qwen's but small, and flat token shards for training.

Text comes from ``corpus.py``; ``{split}.bin`` and ``{split}.offsets.npy`` are what a trainer maps.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from qnext.errors import ConfigError, TextError

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
ADDED_TOKENS = (
    *SPECIAL_TOKENS,
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BATCH = 512


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 8192,
    out_dir: Path | str = "tokenizer",
    *,
    model_max_length: int = 32768,
) -> Tokenizer:
    """Train the BPE and write ``tokenizer.json`` and ``tokenizer_config.json``.

    Normaliser (NFC), split pattern and byte alphabet are Qwen's. The added tokens take the last
    ids, so that ``vocab_size`` is the exact total; only the first three are special, as in Qwen.

    Raises:
        ConfigError: ``vocab_size`` has no room for bytes and added tokens, or the texts are too
            few for so many merges.
    """
    learned = vocab_size - len(ADDED_TOKENS)
    if learned < 256:
        raise ConfigError(
            f"vocab_size {vocab_size} is below 256 bytes plus {len(ADDED_TOKENS)} added tokens",
            hint=f"ask for at least {256 + len(ADDED_TOKENS)}",
        )
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=learned,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != learned:
        raise ConfigError(
            f"the texts give {tokenizer.get_vocab_size()} tokens, {learned} were asked for",
            hint="train on more text or ask for a smaller vocab_size",
        )
    tokenizer.add_tokens(
        [
            AddedToken(t, special=t in SPECIAL_TOKENS, normalized=False, single_word=False)
            for t in ADDED_TOKENS
        ]
    )
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": END_OF_TEXT,
        "bos_token": None,
        "unk_token": None,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(t)): {
                "content": t,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": t in SPECIAL_TOKENS,
            }
            for t in ADDED_TOKENS
        },
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    return tokenizer


def read_texts(jsonl: Path, limit_bytes: int | None = None) -> Iterator[str]:
    """Texts of a corpus file in its order (train is in hash order: a fair sample), up to a size."""
    taken = 0
    with jsonl.open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            yield text
            taken += len(text.encode())
            if limit_bytes is not None and taken >= limit_bytes:
                return


def tokenize_shards(
    jsonl: Path, tokenizer_dir: Path, out_dir: Path, split: str
) -> dict[str, dict[str, int]]:
    """Write ``{split}.bin`` (uint16, flat), ``{split}.offsets.npy`` and update ``manifest.json``.

    ``offsets`` is int64 (n_docs + 1): document n is ``tokens[offsets[n]:offsets[n + 1]]`` and ends
    with ``<|endoftext|>``. The manifest has documents, tokens (with the closing ones) and bytes
    (UTF-8 of the text) of each split, so bits per byte are ``nats * tokens / bytes / ln 2``.

    Raises:
        TextError: the vocabulary does not fit 16 bits or has no ``<|endoftext|>``.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None or tokenizer.get_vocab_size() > 1 << 16:
        raise TextError(
            f"{tokenizer_dir} has {tokenizer.get_vocab_size()} tokens, {END_OF_TEXT} is {end}",
            hint="shards are uint16: use a tokenizer of at most 65536 tokens with an end token",
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    offsets, size = [0], 0
    texts = read_texts(jsonl)
    with (out_dir / f"{split}.bin").open("wb") as shard:
        while batch := list(islice(texts, _BATCH)):
            for text, encoding in zip(batch, tokenizer.encode_batch_fast(batch), strict=True):
                ids = np.asarray([*encoding.ids, end], dtype="<u2")
                shard.write(ids.tobytes())
                offsets.append(offsets[-1] + len(ids))
                size += len(text.encode())
    np.save(out_dir / f"{split}.offsets.npy", np.asarray(offsets, dtype=np.int64))
    path = out_dir / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    manifest[split] = {"documents": len(offsets) - 1, "tokens": offsets[-1], "bytes": size}
    path.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    logger.info("%s: %d documents, %d tokens", split, len(offsets) - 1, offsets[-1])
    return manifest
