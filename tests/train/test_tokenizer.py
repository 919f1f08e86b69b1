"""The small BPE loses nothing, keeps Qwen's layout, and shards match their manifest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from qnext.errors import ConfigError, TextError
from qnext.train.tokenizer import (
    ADDED_TOKENS,
    SPECIAL_TOKENS,
    read_texts,
    tokenize_shards,
    train_tokenizer,
)

TEXTS = [
    f"The {a} of the {b} is not {c}; it's {n} miles from where you'd expect the {a}."
    for n in range(40)
    for a, b, c in (("river", "valley", "deep"), ("kernel", "system", "loaded"))
]
SIZE = 330


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, SIZE, target)
    return target


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_added_tokens_take_the_last_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == SIZE
    ids = [tokenizer.token_to_id(token) for token in ADDED_TOKENS]
    assert ids == list(range(SIZE - len(ADDED_TOKENS), SIZE))
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    assert special == set(SPECIAL_TOKENS)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_round_trip_of_any_text_is_its_nfc(tokenizer: Tokenizer, text: str) -> None:
    import unicodedata

    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)
    assert max(ids, default=0) < SIZE


def test_pieces_split_as_qwen_does(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("It's 42, isn't\n\n  it?")
    words = [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in pieces]
    assert words == ["It", "'s", " ", "4", "2", ",", " isn", "'t", "\n\n", " ", " it", "?"]


def test_training_again_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(TEXTS, SIZE, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_config_names_ends_and_ids(folder: Path, tokenizer: Tokenizer) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (config["eos_token"], config["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    for number, token in config["added_tokens_decoder"].items():
        assert tokenizer.token_to_id(token["content"]) == int(number)
        assert token["special"] == (token["content"] in SPECIAL_TOKENS)


@pytest.mark.parametrize(("texts", "size"), [(TEXTS, 200), (["too few words"], 8192)])
def test_impossible_sizes_are_refused(texts: list[str], size: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        train_tokenizer(texts, size, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def _write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "source": "s"}) + "\n" for t in texts))
    return path


def test_shards_hold_every_document_and_count_it(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = [*TEXTS * 9, "Grüße, 世界", "<|im_end|> is only text here"]
    jsonl = _write(tmp_path / "train.jsonl", texts)
    manifest = tokenize_shards(jsonl, folder, tmp_path, "train")
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    tokens = np.fromfile(tmp_path / "train.bin", dtype="<u2")
    offsets = np.load(tmp_path / "train.offsets.npy")
    end = tokenizer.token_to_id("<|endoftext|>")
    assert manifest["train"] == {
        "documents": len(texts),
        "tokens": len(tokens),
        "bytes": sum(len(t.encode()) for t in texts),
    }
    assert offsets.dtype == np.int64
    assert offsets[0] == 0
    assert offsets[-1] == len(tokens)
    for n, text in enumerate(texts):
        document = tokens[offsets[n] : offsets[n + 1]]
        assert document[-1] == end
        assert tokenizer.decode(document[:-1].tolist(), skip_special_tokens=False) == text
    assert tokenizer.token_to_id("<|im_end|>") not in tokens


def test_both_splits_share_one_manifest(folder: Path, tmp_path: Path) -> None:
    jsonl = _write(tmp_path / "x.jsonl", TEXTS[:3])
    tokenize_shards(jsonl, folder, tmp_path, "train")
    manifest = tokenize_shards(jsonl, folder, tmp_path, "heldout")
    assert manifest["train"] == manifest["heldout"]


def test_a_tokenizer_without_end_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    page = json.loads(tokenizer.to_str())
    page["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(page))
    with pytest.raises(TextError):
        tokenize_shards(_write(tmp_path / "x.jsonl", TEXTS[:1]), tmp_path, tmp_path, "train")


def test_read_texts_stops_at_the_limit(tmp_path: Path) -> None:
    jsonl = _write(tmp_path / "x.jsonl", ["aaaa", "bbbb", "cccc"])
    assert list(read_texts(jsonl, 5)) == ["aaaa", "bbbb"]
    assert list(read_texts(jsonl)) == ["aaaa", "bbbb", "cccc"]
