"""train and data."""

from __future__ import annotations

import json
from pathlib import Path

from toy import write_recipe

from qnext.checkpoint import load_model

SOURCES = """
[[source]]
name = "books"
kind = "apt"
package = "books"
files = ["*.txt"]
extract = "text"
licence = "CC0-1.0"
"""


def write_sources(work: Path) -> Path:
    """A package that looks downloaded and unpacked."""
    (work / "downloads/apt").mkdir(parents=True)
    (work / "downloads/apt/books_1_all.deb").write_bytes(b"package")
    (work / "unpacked/books").mkdir(parents=True)
    for n in range(12):
        words = ["".join("abcdefghij"[int(d)] for d in str(100 * n + i)) for i in range(10)]
        prose = [f"The {w} was kept in the {w}house, and he said he had a {w}." for w in words]
        (work / f"unpacked/books/{n}.txt").write_text("\n\n".join(prose))
    (work / "sources.toml").write_text(SOURCES)
    return work / "sources.toml"


def test_train_writes_a_model_and_goes_on(qnext, tmp_path):
    recipe = write_recipe(tmp_path, device="cpu", log_every=1)
    model = tmp_path / "run" / "model"
    assert qnext("train", recipe, "stop_after_s=0.001").out == f"{model}\n"
    assert qnext("train", recipe, "steps=3").code == 0
    assert load_model(model).config.num_hidden_layers == 2
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    done = qnext("train", recipe, "steps=nonsense")
    assert done.code == 2
    assert "steps" in done.err


def test_data_makes_text_tokenizer_and_shards(qnext, tmp_path):
    sources, out = write_sources(tmp_path), tmp_path / "out"
    options = ("--work", tmp_path, "--vocab-size", 300, "--jobs", 1, "--heldout-bytes", 2000)
    done = qnext("data", "corpus", sources, out, *options)
    assert (done.code, done.out) == (0, f"{out / 'shards'}\n")
    shards = json.loads((out / "shards/manifest.json").read_text())
    assert shards["train"]["tokens"] > shards["heldout"]["tokens"] > 0
    assert (out / "tokenizer/tokenizer.json").is_file()


def test_plan_says_what_a_recipe_takes(qnext):
    recipe = Path(__file__).resolve().parents[2] / "recipes/next-80b/pretrain.toml"
    done = qnext("plan", "--train", recipe, "--ranks", 128, "--json")
    assert done.code == 0
    made = json.loads(done.out)
    # A little more than an even share: some rows do not divide.
    assert 0 <= made["memory"]["masters (FP32)"] - 4 * 81_324_862_720 // 128 < 1e6
    assert made["total"] == sum(made["memory"].values()) < 80e9
    assert "| **held in all** |" in qnext("plan", "--train", recipe, "--ranks", 128).out
    done = qnext("plan", "--train", recipe, "--ranks", 100)
    assert (done.code, "do not divide" in done.err) == (2, True)
