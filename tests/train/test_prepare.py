"""Texts into shards: every format, every fault by file and line, nothing twice."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from qnext.errors import ConfigError, TrainingError
from qnext.train.data import TokenShards
from qnext.train.prepare import prepare_shards

WORDS = ["<|endoftext|>", "[UNK]", *"abcdefghij"]


def _tokenizer(folder: Path, extra: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {w: i for i, w in enumerate(WORDS)}
    vocab |= {f"w{i}": len(WORDS) + i for i in range(extra)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _recipe(folder: Path, *sources: dict[str, Any], **top: Any) -> Path:
    words = {"output": str(folder / "out"), "tokenizer": str(_tokenizer(folder / "tok")), **top}
    lines = [f"{k} = {json.dumps(v)}" for k, v in words.items()]
    for source in sources:
        lines += ["[[source]]", *(f"{k} = {json.dumps(v)}" for k, v in source.items())]
    file = folder / "data.toml"
    file.write_text("\n".join(lines))
    return file


def _documents(folder: Path, split: str = "train") -> list[str]:
    shards = TokenShards(folder, split)
    out = []
    for n in range(len(shards)):
        words = [WORDS[t] for t in shards.document(n)]
        assert words.pop() == "<|endoftext|>"
        out.append(" ".join(words))
    return out


def _jsonl(file: Path, *rows: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return file


def test_every_format_gives_its_texts(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    _jsonl(tmp_path / "j/1.jsonl", {"text": "a b"}, {"text": "c", "more": 1})
    with gzip.open(tmp_path / "j/2.jsonl.gz", "wt") as file:
        file.write('{"text": "d"}\n')
    pq.write_table(pa.table({"id": [1, 2], "body": ["e f", "g"]}), tmp_path / "x.parquet")
    (tmp_path / "t.txt").write_text("a\nb\n\n\nc\n")
    files = str(tmp_path / "j/*")
    text = {"files": [str(tmp_path / "t.txt")]}
    recipe = _recipe(
        tmp_path,
        {"name": "jsonl", "files": [files]},
        {"name": "parquet", "files": [str(tmp_path / "*.parquet")], "text_key": "body"},
        {"name": "whole", **text},
        {"name": "paragraphs", "sample_by": "paragraph", **text},
        {"name": "first", "files": [files], "max_documents": 2},
        heldout_share=0.0,
    )
    folders = prepare_shards(recipe, [])
    got = {folder.name: _documents(folder) for folder in folders}
    assert got == {
        "jsonl": ["a b", "c", "d"],
        "parquet": ["e f", "g"],
        "whole": ["a b c"],
        "paragraphs": ["a b", "c"],
        "first": ["a b", "c"],
    }
    manifest = json.loads((folders[0] / "manifest.json").read_text())
    assert manifest["train"] == {"documents": 3, "tokens": 7, "bytes": 5}
    assert manifest["heldout"]["documents"] == manifest["skipped"] == 0
    assert manifest["dtype"] == "uint16"


def test_a_hub_data_set_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _jsonl(tmp_path / "set/train.jsonl", {"text": "a b"}, {"text": "c"}, {"text": ""})
    _jsonl(tmp_path / "set/test.jsonl", {"text": "d"})
    name = str(tmp_path / "set")
    recipe = _recipe(tmp_path, {"name": "hub", "dataset": name, "split": "train"}, heldout_share=0)
    with pytest.raises(TrainingError, match=r"set\[train\]:row 3: field 'text' is empty"):
        prepare_shards(recipe, [])
    [folder] = prepare_shards(recipe, ["on_bad_record=skip"])
    assert _documents(folder) == ["a b", "c"]
    recipe = _recipe(tmp_path, {"name": "none", "dataset": name, "split": "dev"})
    with pytest.raises(TrainingError, match=r"data set .* cannot be read: "):
        prepare_shards(recipe, [])
    recipe = _recipe(tmp_path, {"name": "key", "dataset": name, "text_key": "body"})
    with pytest.raises(TrainingError, match="has no field 'body'; it has text"):
        prepare_shards(recipe, [])


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        ('{"text": "a"', "not JSON "),
        ("[1]", "a JSON list, not an object"),
        ('{"text": "  "}', "field 'text' is empty"),
        ('{"body": "a"}', "field 'text' is missing"),
        ('{"text": 3}', "field 'text' is int, not text"),
        ("", "the line is empty"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path: Path, bad: str, fault: str) -> None:
    file = _jsonl(tmp_path / "x.jsonl", {"text": "a"}, bad, {"text": "b"})
    recipe = _recipe(tmp_path, {"name": "x", "files": [str(file)]}, heldout_share=0.0)
    with pytest.raises(TrainingError) as caught:
        prepare_shards(recipe, [])
    assert str(caught.value).startswith(f"{file}:2: {fault}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out/x").exists()
    [folder] = prepare_shards(recipe, ["on_bad_record=skip"])
    assert _documents(folder) == ["a", "b"]
    assert json.loads((folder / "manifest.json").read_text())["skipped"] == 1
    assert (folder / "skipped.txt").read_text().startswith(f"{file}:2: {fault}")


def test_bytes_that_are_not_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"a\n\xff\xfe\n")
    source = {"name": "x", "files": [str(tmp_path / "x.txt")], "sample_by": "line"}
    with pytest.raises(TrainingError, match=r"x\.txt:2: not UTF-8"):
        prepare_shards(_recipe(tmp_path, source), [])
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(TrainingError, match=r"x\.jsonl:1: not UTF-8"):
        prepare_shards(_recipe(tmp_path, {"name": "y", "files": [str(tmp_path / "x.jsonl")]}), [])


def test_the_heldout_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    rows = [{"text": " ".join(WORDS[2 + int(d)] for d in str(n))} for n in range(400)]
    one = _jsonl(tmp_path / "one.jsonl", *rows)
    two = _jsonl(tmp_path / "two.jsonl", *rows[::-1])
    recipe = _recipe(
        tmp_path,
        {"name": "one", "files": [str(one)]},
        {"name": "two", "files": [str(two)]},
        heldout_share=0.2,
    )
    a, b = prepare_shards(recipe, [])
    held = _documents(a, "heldout")
    assert held == _documents(b, "heldout")[::-1]
    assert 40 < len(held) < 120
    assert sorted(held + _documents(a)) == sorted(str(r["text"]) for r in rows)


def test_shards_are_made_once_and_never_mixed_up(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "x.jsonl", {"text": "a"})
    recipe = _recipe(tmp_path, {"name": "x", "files": [str(file)]}, heldout_share=0.0)
    [folder] = prepare_shards(recipe, [])
    before = (folder / "train.bin").stat().st_mtime_ns
    prepare_shards(recipe, [])
    assert (folder / "train.bin").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="made by another recipe or tokenizer"):
        prepare_shards(recipe, ["heldout_share=0.5"])


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    _tokenizer(tmp_path / "big", extra=70_000)
    file = _jsonl(tmp_path / "x.jsonl", {"text": "a w69000"})
    recipe = _recipe(tmp_path, {"name": "x", "files": [str(file)]}, heldout_share=0.0)
    [folder] = prepare_shards(recipe, [f"tokenizer={tmp_path / 'big'}"])
    shards = TokenShards(folder, "train")
    assert shards.tokens.dtype == np.uint32
    assert shards.document(0).tolist() == [2, 69_000 + len(WORDS), 0]


def test_recipes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "x.jsonl", {"text": "a"})
    source = {"name": "x", "files": [str(file)]}

    def refuse(match: str, *sources: dict[str, Any], **top: Any) -> None:
        with pytest.raises((ConfigError, TrainingError), match=match):
            prepare_shards(_recipe(tmp_path, *sources, **top), [])

    refuse(r"unknown key source\.0\.filez \(did you mean files\?\)", {"name": "x", "filez": []})
    refuse("give either files or dataset", {"name": "x"})
    refuse("source names must differ", source, source)
    refuse("no file matches", {"name": "x", "files": [str(tmp_path / "no*.jsonl")]})
    refuse("the format of .xyz is not known", {"name": "x", "files": [str(_odd(tmp_path))]})
    refuse("tokenizer.json does not exist", source, tokenizer=str(tmp_path / "no"))
    refuse("has no token <eos>", source, end_of_text="<eos>")


def _odd(folder: Path) -> Path:
    file = folder / "x.xyz"
    file.write_text("a")
    return file
