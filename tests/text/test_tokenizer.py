from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from qnext.errors import TextError
from qnext.text import Tokenizer
from qnext.text.qwen3 import qwen3_tokenizer_from_ranks

TEXTS = [
    "",
    "Hello, world! It's 2026 and I'LL count 1234567890.",
    "通义千问是阿里云研发的大语言模型。",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا बनाए रखें",
    "def f(x):\n\treturn {k: v for k, v in x.items()}\r\n\r\n    # done   \n",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 = é, \u212b, ﬁ, 한국어, \u200b\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n<think>\nx</think><tool_call>{}</tool_call><|not_a_token|>",
    "   leading  and trailing   ",
    "\x00\x01\x7f\u0080 control",
]


def test_the_rebuilt_tokenizer_is_the_published_one(qwen3_folder: Path, qwen3: Tokenizer) -> None:
    saved = json.loads((qwen3_folder / "tokenizer.json").read_text())
    assert len(saved["model"]["vocab"]) == 151_643
    assert len(saved["model"]["merges"]) == 151_387
    assert [t["id"] for t in saved["added_tokens"]] == list(range(151_643, 151_669))
    assert qwen3.vocab_size == 151_669
    assert qwen3.special_ids == set(range(151_643, 151_657))
    assert qwen3.added_tokens[151_668] == "</think>"
    assert qwen3.eos_token_ids == (151_645, 151_643)
    assert (qwen3.bos_token_id, qwen3.pad_token_id) == (None, 151_643)
    assert qwen3.padding_ids(151_936) == list(range(151_669, 151_936))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_transformers(qwen3: Tokenizer, hf_tokenizer: Any, text: str) -> None:
    ids = qwen3.encode(text)
    assert ids == hf_tokenizer.encode(text, add_special_tokens=False)
    assert qwen3.encode_batch([text, "x"]) == [ids, qwen3.encode("x")]
    for skip in (False, True):
        assert qwen3.decode(ids, skip) == hf_tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 151_935), max_size=12), skip=st.booleans())
def test_decode_equals_the_library(qwen3: Tokenizer, ids: list[int], skip: bool) -> None:
    assert qwen3.decode(ids, skip) == qwen3.backend.decode(ids, skip_special_tokens=skip)


def test_tags_survive_skip_special_tokens(qwen3: Tokenizer) -> None:
    ids = qwen3.encode("<|im_start|><think>a</think><tool_call>b</tool_call><|im_end|>")
    assert qwen3.decode(ids) == "<think>a</think><tool_call>b</tool_call>"


def test_lone_surrogates_are_encodable(qwen3: Tokenizer) -> None:
    assert qwen3.decode(qwen3.encode("a\ud800b")) == "a?b"


def test_padding_ids_need_a_row_for_every_token(qwen3: Tokenizer) -> None:
    with pytest.raises(TextError, match="151668"):
        qwen3.padding_ids(151_643)


def test_missing_and_damaged_files(qwen3_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"no tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(TextError, match="is not a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[]", "not an object"),
        ("tokenizer_config.json", '{"eos_token": "<nowhere>"}', "not in the vocabulary"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"7": {"content": "<think>"}}}',
            "puts '<think>' at 7",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {}}}', "damaged"),
        ("generation_config.json", '{"eos_token_id": "end"}', "not token ids"),
    ],
)
def test_contradicting_files(small_folder: Path, name: str, text: str, message: str) -> None:
    (small_folder / name).write_text(text)
    with pytest.raises(TextError, match=message):
        Tokenizer.from_pretrained(small_folder)


def test_tokens_listed_only_in_the_config_are_added(small_folder: Path) -> None:
    token = {"256": {"content": "<extra>", "special": True}}
    (small_folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"added_tokens_decoder": {**_known(small_folder), **_at_end(small_folder, token)}}
        )
    )
    tokenizer = Tokenizer.from_pretrained(small_folder)
    assert tokenizer.token_to_id("<extra>") == tokenizer.vocab_size - 1
    assert tokenizer.decode(tokenizer.encode("a<extra>b")) == "ab"


def test_end_tokens_of_a_text_config(small_folder: Path) -> None:
    (small_folder / "config.json").write_text('{"text_config": {"eos_token_id": 5}}')
    assert Tokenizer.from_pretrained(small_folder).eos_token_ids == (5,)


def test_other_kinds_of_tokenizers_are_refused() -> None:
    with pytest.raises(TextError, match="byte-level"):
        Tokenizer(Backend(models.WordLevel({"a": 0}, unk_token="a")))


def test_ranks_must_be_complete() -> None:
    with pytest.raises(TextError, match="not the ids"):
        qwen3_tokenizer_from_ranks({b"a": 0, b"b": 2})
    with pytest.raises(TextError, match="cannot be reached"):
        qwen3_tokenizer_from_ranks({b"a": 0, b"b": 1, b"aba": 2})
    with pytest.raises(TextError, match="no rank"):
        qwen3_tokenizer_from_ranks({b"a": 0, b"ax": 1})


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    ranks = {bytes([i]): i for i in range(256)}
    qwen3_tokenizer_from_ranks(ranks).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def _known(folder: Path) -> dict[str, Any]:
    saved = json.loads((folder / "tokenizer.json").read_text())
    return {str(t["id"]): {"content": t["content"]} for t in saved["added_tokens"]}


def _at_end(folder: Path, token: dict[str, Any]) -> dict[str, Any]:
    last = max(int(i) for i in _known(folder))
    return {str(last + 1): next(iter(token.values()))}
