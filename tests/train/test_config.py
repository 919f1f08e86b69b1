"""Recipes: strict keys, overrides, and a resolved file that reads back as itself."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from toy import write_recipe

from qnext.checkpoint import build_model
from qnext.config import ModelConfig
from qnext.errors import ConfigError
from qnext.train.config import dump_recipe, load_recipe


def test_overrides_are_typed_by_toml_and_words_are_strings(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    overrides = ["steps=7", "optimizer.lr=2e-3", "device=cpu", "optimizer.betas=[0.8, 0.9]"]
    config = load_recipe(recipe, [*overrides, "model.num_experts=8", "data.seq_len = 16"])
    assert config.steps == 7
    assert config.optimizer.lr == 2e-3
    assert config.device == "cpu"
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.model["num_experts"] == 8
    assert config.data.seq_len == 16


def test_the_resolved_recipe_is_a_recipe(tmp_path: Path) -> None:
    config = load_recipe(write_recipe(tmp_path), ["loss.mtp_weight=0.2"])
    resolved = tmp_path / "run.toml"
    resolved.write_text(dump_recipe(config))
    assert load_recipe(resolved, []) == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lrr=1", r"unknown key optimizer\.lrr \(did you mean lr\?\)"),
        ("stepz=1", r"unknown key stepz \(did you mean steps\?\)"),
        ("data.seqlen=4", r"did you mean seq_len\?"),
        ("steps=0", r"steps = 0"),
        ("optimizer.lr=fast", r"optimizer\.lr = 'fast'"),
        ("steps", r"not of the form"),
        (".steps=1", r"not of the form"),
        ("steps.more=1", r"steps is not a section"),
    ],
)
def test_wrong_overrides_are_named(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_recipe(write_recipe(tmp_path), [override])


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe(tmp_path / "none.toml", [])
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = \n")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_recipe(broken, [])
    broken.write_text("steps = 1\n")
    with pytest.raises(ConfigError, match=r"output is missing.*data is missing"):
        load_recipe(broken, [])


def _sizes(recipe: Path) -> tuple[int, float]:
    config = ModelConfig.from_dict(tomllib.loads(recipe.read_text())["model"])
    total, active = 0, 0.0
    for name, p in build_model(config, device="meta").named_parameters():
        total += p.numel()
        if not name.startswith("mtp."):
            share = config.num_experts_per_tok / config.num_experts if config.num_experts else 1
            active += p.numel() * (share if ".experts." in name else 1)
    return total, active


def test_the_shipped_recipes_fit_the_box_and_each_other(repository: Path) -> None:
    folder = repository / "recipes" / "qnext-small"
    total, active = _sizes(folder / "train.toml")
    assert total * 2 < 48 * 2**20 - 2**16  # BF16 and the file's header
    _, dense = _sizes(folder / "dense.toml")
    assert dense == pytest.approx(active, rel=0.01)
    ours, theirs = (load_recipe(folder / f, []) for f in ("train.toml", "dense.toml"))
    assert (ours.data, ours.steps, ours.seed) == (theirs.data, theirs.steps, theirs.seed)
