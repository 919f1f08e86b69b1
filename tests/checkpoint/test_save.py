"""Folders written, read and written again: the same bytes, in every storage."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import draw_ids, tiny_model, whole

from qnext.checkpoint import load_model, save_model
from qnext.checkpoint.reader import INDEX, SINGLE, SafetensorsFolder
from qnext.errors import ConfigError
from qnext.layers.model import CausalLM

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {},
    "qwen3_next, tied, three value heads a key head": {
        "tie_word_embeddings": True, "linear_num_value_heads": 6},
    "qwen3_5": {"num_nextn_predict_layers": 0, "mtp_num_hidden_layers": 1, "model_type": "qwen3_5"},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe", "mlp_only_layers": []},
    "qwen3_moe": {"model_type": "qwen3_moe", "layer_types": None, "partial_rotary_factor": 1.0,
                  "shared_expert_intermediate_size": 0, "num_nextn_predict_layers": 0},
    "qwen3": {"model_type": "qwen3", "layer_types": None, "partial_rotary_factor": 1.0,
              "attention_bias": True, "num_nextn_predict_layers": 0},
}  # fmt: skip


def assert_same_folders(a: Path, b: Path) -> None:
    names = sorted(p.name for p in a.iterdir())
    assert names == sorted(p.name for p in b.iterdir())
    _, different, errors = filecmp.cmpfiles(a, b, names, shallow=False)
    assert not different
    assert not errors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", [10**9, 9_000])
@pytest.mark.parametrize("fused", [False, True])
def test_round_trips_are_byte_identical(
    family: str, dtype: torch.dtype, shard: int, fused: bool, tmp_path: Path
) -> None:
    model = tiny_model(dtype, **FAMILIES[family])
    how = {"max_shard_size": shard, "fused_experts": fused}
    save_model(model, tmp_path / "a", **how)
    again = load_model(tmp_path / "a", device="cpu")
    assert again.config == model.config
    assert not again.training
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert p.dtype == q.dtype
        assert torch.equal(p, q), name
    save_model(again, tmp_path / "b", **how)
    assert_same_folders(tmp_path / "a", tmp_path / "b")
    assert ((tmp_path / "a" / INDEX).exists()) == (shard == 9_000)


def test_shards_keep_to_their_size_and_the_index_tells_the_truth(tmp_path: Path) -> None:
    model = tiny_model(torch.float32)
    save_model(model, tmp_path, max_shard_size=20_000)
    index = json.loads((tmp_path / INDEX).read_text())
    folder = SafetensorsFolder(tmp_path)
    assert index["metadata"]["total_size"] == folder.nbytes
    assert index["weight_map"] == {n: e.file.name for n, e in folder.entries.items()}
    sizes: dict[Path, list[int]] = {}
    for entry in folder.entries.values():
        sizes.setdefault(entry.file, []).append(entry.nbytes)
    assert len(sizes) > 3
    assert all(sum(s) <= 20_000 or len(s) == 1 for s in sizes.values())
    assert [f.name for f in sorted(sizes)] == [
        f"model-{i + 1:05d}-of-{len(sizes):05d}.safetensors" for i in range(len(sizes))
    ]


def test_saving_again_leaves_nothing_stale(tmp_path: Path) -> None:
    model = tiny_model(torch.float32)
    save_model(model, tmp_path, max_shard_size=20_000)
    save_model(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", SINGLE]
    save_model(model, tmp_path, max_shard_size=20_000)
    assert not (tmp_path / SINGLE).exists()
    load_model(tmp_path, device="cpu")


def test_casting_while_saving_and_while_loading(tmp_path: Path) -> None:
    model = tiny_model(torch.float32)
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / SINGLE).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name in ("float32", "fp32", torch.float32):
        wide = load_model(tmp_path, device="cpu", dtype=name)
        assert {p.dtype for p in wide.parameters()} == {torch.float32}
        for p, q in zip(model.parameters(), wide.parameters(), strict=True):
            assert torch.equal(p.bfloat16().float(), q)


def test_vectors_keep_a_wider_dtype_of_their_own(tmp_path: Path) -> None:
    save_model(tiny_model(torch.bfloat16), tmp_path / "a")
    file = tmp_path / "a" / SINGLE
    tensors = load_file(file)
    tensors = {n: t.float() if n.endswith("A_log") else t for n, t in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    model = load_model(tmp_path / "a", device="cpu")
    assert model.model.layers[0].linear_attn.A_log.dtype == torch.float32
    assert model.dtype == torch.bfloat16
    save_model(model, tmp_path / "b")
    assert filecmp.cmp(file, tmp_path / "b" / SINGLE, shallow=False)


def test_a_saved_model_computes_the_same(tmp_path: Path) -> None:
    model: CausalLM = tiny_model(torch.float64, rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32})  # fmt: skip
    save_model(model, tmp_path)
    ids = draw_ids(model, 70)
    again = load_model(tmp_path, device="cpu").requires_grad_(False)
    assert torch.equal(whole(again, ids), whole(model, ids))


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    save_model(tiny_model(torch.float32), tmp_path, max_shard_size=20_000)
    calls: list[tuple[int, int]] = []
    load_model(tmp_path, device="cpu", progress=lambda done, total: calls.append((done, total)))
    total = SafetensorsFolder(tmp_path).nbytes
    assert calls[-1] == (total, total)
    assert [c[0] for c in calls] == sorted(c[0] for c in calls)


def test_extra_files_come_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "config.json", "x.bin"):
        (source / name).write_text("{}")
    save_model(tiny_model(torch.float32), tmp_path / "out", extra_files=source)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"tokenizer.json", "chat_template.jinja", "LICENSE", "config.json", SINGLE}
    assert (tmp_path / "out/config.json").read_text() != "{}"


@pytest.mark.parametrize(("option", "value"), [("dtype", "int8"), ("device", "tpu9")])
def test_options_that_cannot_be(option: str, value: str, tmp_path: Path) -> None:
    save_model(tiny_model(torch.float32), tmp_path)
    with pytest.raises(ConfigError, match=value):
        load_model(tmp_path, **{option: value})
