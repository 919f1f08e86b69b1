"""inspect, pull and convert."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from loopback_hubs import HubServer

from qnext.checkpoint import load_model
from qnext.cli.checkpoints import parse_size
from qnext.errors import ConfigError

PUBLISHED_80B = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def weights(folder: Path) -> dict[str, bytes]:
    """The weight files of a folder."""
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors*"))}


def test_inspect_of_the_published_80b_config(qnext, tmp_path):
    file = tmp_path / "next-80b.json"
    file.write_text(json.dumps(PUBLISHED_80B))
    facts = json.loads(qnext("inspect", file, "--json").out)
    assert facts["parameters"] == 79_674_391_296
    assert facts["body_parameters"] == 79_052_061_440
    assert facts["active_parameters"] == 3_874_929_408
    assert facts["active_body_parameters"] == 3_252_599_552
    assert facts["active_body_share"] == pytest.approx(0.0411, abs=5e-5)
    assert (facts["size_name"], facts["size_name_share"]) == ("80B-A3B", 0.0375)
    assert facts["layers"] == {"linear_attention": 36, "full_attention": 12}
    assert facts["experts"] == "10 + 1 shared of 512"
    assert facts["tensors"] == 74_391
    assert facts["mtp_parameters"] == 0
    assert facts["kv_bytes_per_token"] == 12 * 2 * 2 * 2 * 256
    assert facts["state_bytes_per_sequence"] == 36 * (4 * 32 * 128 * 128 + 2 * 8192 * 3)
    assert facts["bytes"]["bfloat16"] == 2 * 79_674_391_296
    assert 80e9 < facts["bytes"]["float8, 128x128 scales"] < 81e9
    text = qnext("inspect", file).out
    assert "79,674,391,296" in text
    assert "80B-A3B (3.75%)" in text


def test_inspect_of_a_fetched_index_finds_mtp(qnext, tmp_path):
    from qnext.config import ModelConfig
    from qnext.weights import disk_tensors

    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_80B))
    config = ModelConfig.from_dict({**PUBLISHED_80B, "num_nextn_predict_layers": 1})
    names = {t.name: "model-00001-of-00041.safetensors" for t in disk_tensors(config)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    facts = json.loads(qnext("inspect", tmp_path, "--json").out)
    assert facts["tensors"] == 75_944
    assert facts["parameters"] + facts["mtp_parameters"] == 81_324_862_720
    assert facts["weights"] == "as the index names them"
    del names["model.layers.0.linear_attn.A_log"]
    index.write_text(json.dumps({"weight_map": names}))
    done = qnext("inspect", tmp_path)
    assert done.code == 1
    assert "differ in 1 tensors, such as model.layers.0.linear_attn.A_log" in done.err


def test_inspect_checks_the_weights_that_are_there(qnext, tiny_folder):
    facts = json.loads(qnext("inspect", tiny_folder, "--json").out)
    model = load_model(tiny_folder)
    mtp = sum(p.numel() for p in model.mtp.parameters())
    assert facts["mtp_parameters"] == mtp
    assert facts["parameters"] + mtp == sum(p.numel() for p in model.parameters())
    assert facts["weights"].startswith("all there")
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps({**config, "num_experts": 7}))
    done = qnext("inspect", tiny_folder)
    assert done.code == 1
    assert "lacks" in done.err


def test_inspect_of_the_model_in_the_box_is_under_48_mib(qnext):
    facts = json.loads(qnext("inspect", "--json").out)
    assert facts["weights"].startswith("all there")
    assert facts["mtp_parameters"] > 0
    assert facts["bytes"]["bfloat16"] < 48 << 20


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "gpt2"}'])
def test_inspect_of_a_bad_config_is_asked_wrongly(qnext, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert qnext("inspect", tmp_path / "config.json").code == 2


def test_convert_round_trips_are_byte_identical(qnext, tiny_folder, tmp_path):
    (tiny_folder / "tokenizer.json").write_text("{}")
    fused, shards, wide, back = (tmp_path / n for n in ("fused", "shards", "wide", "back"))
    assert qnext("convert", tiny_folder, fused, "--fused-experts").out == f"{fused}\n"
    assert weights(fused) != weights(tiny_folder)
    assert qnext("convert", fused, shards, "--max-shard-size", "20KB").code == 0
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert any(name.endswith("experts.gate_up_proj") for name in index["weight_map"])
    assert len(weights(shards)) > 3
    assert qnext("convert", shards, wide, "--dtype", "float32").code == 0
    assert json.loads((wide / "config.json").read_text())["torch_dtype"] == "float32"
    done = qnext("convert", wide, back, "--dtype", "bfloat16", "--no-fused-experts")
    assert done.code == 0
    assert weights(back) == weights(tiny_folder)
    for name in ("config.json", "tokenizer.json"):
        assert (back / name).read_bytes() == (tiny_folder / name).read_bytes()
    assert load_model(wide).dtype == torch.float32


def test_convert_refuses_to_overwrite(qnext, tiny_folder, tmp_path):
    done = qnext("convert", tiny_folder, tiny_folder)
    assert done.code == 2
    target = tmp_path / "target"
    target.mkdir()
    (target / "notes").write_text("mine")
    assert qnext("convert", tiny_folder, target).code == 2
    assert qnext("convert", tiny_folder, target / "notes").code == 2
    assert [p.name for p in target.iterdir()] == ["notes"]
    assert qnext("convert", tiny_folder, target, "--force").code == 0
    assert weights(target) == weights(tiny_folder)


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 500_000_000), ("5GB", 5_000_000_000), ("1.5kb", 1500)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-5GB", "0MB", "5 TB", "infGB", "nanMB"])
def test_bad_sizes_are_refused(text):
    with pytest.raises(ConfigError):
        parse_size(text)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face server on this machine, and the client set to it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        address = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        yield server


def test_pull_then_use_offline(qnext, hub, tiny_folder, tmp_path):
    files = {p.name: p.read_bytes() for p in tiny_folder.iterdir()}
    commit = hub.commit("org/tiny", files)
    assert qnext("pull", "org/tiny", "--offline").code == 1
    row = json.loads(qnext("pull", "org/tiny", "--json").out)
    assert row["revision"] == commit
    assert set(row["files"]) == set(files)
    assert row["bytes"] == sum(map(len, files.values()))
    assert weights(Path(row["path"])) == weights(tiny_folder)
    assert qnext("pull", "org/tiny", "--offline").out == f"{row['path']}\n"
    assert "all there" in qnext("inspect", "org/tiny", "--offline").out
    target = tmp_path / "here"
    assert qnext("pull", "org/tiny", "--local-dir", target).out == f"{target}\n"
    assert weights(target) == weights(tiny_folder)


def test_inspect_of_a_hub_id_fetches_no_weights(qnext, hub, tiny_folder, tmp_path):
    sharded = tmp_path / "sharded"
    qnext("convert", tiny_folder, sharded, "--max-shard-size", "20KB")
    hub.commit("org/tiny", {p.name: p.read_bytes() for p in sharded.iterdir()})
    facts = json.loads(qnext("inspect", "org/tiny", "--json").out)
    assert facts["weights"] == "as the index names them"
    assert set(hub.fetched()) == {"config.json", "model.safetensors.index.json"}
    shutil.rmtree(sharded)
