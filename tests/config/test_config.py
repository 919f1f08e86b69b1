"""config.json in and out: both spellings, strict errors, exact round trips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import HYBRID

from qnext.config import ARCHITECTURES, ModelConfig
from qnext.errors import ConfigError

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**HYBRID, **changes})


def without(*keys: str, **changes: Any) -> dict[str, Any]:
    return {k: v for k, v in {**HYBRID, **changes}.items() if k not in keys}


@pytest.mark.parametrize("yarn", [None, YARN])
def test_both_spellings_of_rope_mean_the_same(yarn: dict[str, Any] | None) -> None:
    old = read(rope_scaling=yarn)
    inner = {**(yarn or {"rope_type": "default"}), "rope_theta": 10000.0,
             "partial_rotary_factor": 0.25}  # fmt: skip
    new = without("rope_theta", "partial_rotary_factor", rope_parameters=inner)
    assert ModelConfig.from_dict(new) == old
    assert (old.rope_scaling is None) == (yarn is None)
    assert ModelConfig.from_dict({**HYBRID, "rope_parameters": inner}) == old  # both, agreeing


def test_the_old_word_for_the_rope_type() -> None:
    old = {"type" if k == "rope_type" else k: v for k, v in YARN.items()}
    assert read(rope_scaling=old) == read(rope_scaling=YARN)


def test_spellings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"rope_theta is 10000\.0 at the top level and 5"):
        read(rope_parameters={"rope_theta": 5.0})


def test_yarn_without_an_original_length_takes_the_model_length() -> None:
    config = read(rope_scaling={"rope_type": "yarn", "factor": 2.0})
    assert config.rope_scaling is not None
    assert config.rope_scaling.original_max_position_embeddings == 512


def test_layers_by_interval_list_and_step() -> None:
    data = without("layer_types", "mlp_only_layers", num_hidden_layers=8, decoder_sparse_step=2)
    kinds = ModelConfig.from_dict(data).layer_types
    assert [i for i, k in enumerate(kinds) if k == "full_attention"] == [3, 7]
    by_three = ModelConfig.from_dict({**data, "full_attention_interval": 3}).layer_types
    assert [i for i, k in enumerate(by_three) if k == "full_attention"] == [2, 5]
    assert ModelConfig.from_dict(data).sparse_layers == (False, True) * 4
    assert read(mlp_only_layers=[0, 3]).sparse_layers == (False, True, True, False)


def test_nested_text_config_takes_the_outer_tokens() -> None:
    text = without("model_type", model_type="qwen3_5_moe_text")
    data = {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": {"depth": 3},
            "tie_word_embeddings": True, "eos_token_id": [3, 4]}  # fmt: skip
    config = ModelConfig.from_dict(data)
    assert config.model_type == "qwen3_5_moe"
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (3, 4)


def test_experts_by_the_name_of_transformers_5() -> None:
    data = without("num_experts", num_local_experts=6)
    assert ModelConfig.from_dict(data) == read()


@pytest.mark.parametrize(
    ("key", "near"),
    [("num_expert", "num_experts"), ("hiden_size", "hidden_size"), ("rope_thetta", "rope_theta"),
     ("sparse_layers", None), ("zero_centred_norms", None), ("frobnicate", None)],
)  # fmt: skip
def test_an_unknown_key_is_named_with_its_neighbour(key: str, near: str | None) -> None:
    with pytest.raises(ConfigError, match=repr(key)) as caught:
        read(**{key: 1})
    if near is not None:
        assert near in str(caught.value.hint)


NEEDED = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rope_theta", "max_position_embeddings", "linear_num_key_heads",
    "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "num_experts_per_tok",
    "moe_intermediate_size", "norm_topk_prob", "intermediate_size",
]  # fmt: skip


@pytest.mark.parametrize("key", NEEDED)
@pytest.mark.parametrize("null", [False, True])
def test_a_missing_field_is_named(key: str, null: bool) -> None:
    data = {**HYBRID, key: None} if null else without(key)
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_dict(data)


@pytest.mark.parametrize("kind", [None, "llama", "", 3, ["qwen3"], "Qwen3_Next"])
def test_an_unknown_model_type(kind: Any) -> None:
    with pytest.raises(ConfigError, match="model_type") as caught:
        read(model_type=kind)
    assert "qwen3_next" in str(caught.value.hint)


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"num_attention_heads": 3}, "num_attention_heads 3 is no multiple"),
    ({"linear_num_value_heads": 3}, "linear_num_value_heads 3 is no multiple"),
    ({"num_experts_per_tok": 7}, "num_experts_per_tok 7 exceeds"),
    ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4"),
    ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ({"layer_types": "full_attention"}, "layer_types"),
    ({"model_type": "qwen3", "partial_rotary_factor": 1.0}, "no linear_attention layers"),
    ({"partial_rotary_factor": 0.1}, "even number of channels"),
    ({"head_dim": 12}, "even number of channels"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": -24}, "hidden_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers"),
    ({"num_experts": 10**9}, "num_experts"),
    ({"rope_theta": 0.0}, "rope_theta"),
    ({"rope_theta": -1.0}, "rope_theta"),
    ({"rope_theta": float("inf")}, "rope_theta"),
    ({"rope_theta": float("nan")}, "rope_theta"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
    ({"eos_token_id": 61}, "eos_token_id 61"),
    ({"eos_token_id": [1, -1]}, "eos_token_id -1"),
    ({"num_nextn_predict_layers": 2}, "num_mtp_layers"),
    ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim"),
    ({"full_attention_interval": 0, "layer_types": None}, "full_attention_interval"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_dropout": 0.1}, "attention_dropout"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "'linear'"),
    ({"rope_scaling": {**YARN, "factor": 0.0}}, "factor"),
    ({"rope_scaling": {**YARN, "fator": 2.0}}, "fator"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "factor is missing"),
    ({"rope_scaling": {"factor": 2.0}}, "factor"),
    ({"model_type": "qwen3_moe", "layer_types": None}, "no shared expert"),
]


@pytest.mark.parametrize(("changes", "words"), IMPOSSIBLE)
def test_impossible_shapes_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    assert words in str(caught.value)


TRUTHS = {"rope_theta": [4.5], "mlp_only_layers": [[]], "norm_topk_prob": [True]}
LIES = [
    (key, value)
    for key in HYBRID
    for value in ("4", 4.5, True, [], [4.5], {"a": 1}, "yarn")
    if value not in TRUTHS.get(key, [])
]


@pytest.mark.parametrize(("key", "value"), LIES)
def test_lying_types_are_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**{key: value})
    assert key.replace("num_nextn_predict", "num_mtp") in str(caught.value)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters", "decoder_sparse_step",
                                 "full_attention_interval", "eos_token_id"])  # fmt: skip
@pytest.mark.parametrize("value", ["x", 4.5, True, [[]], [1.5], {"a": [1]}])
def test_lying_types_of_optional_keys(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key if "rope" not in key else "rope"):
        read(layer_types=None, **{key: value})


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Any model that can be built."""
    kind = draw(st.sampled_from(list(ARCHITECTURES)))
    hybrid, sparse = kind not in ("qwen3", "qwen3_moe"), kind not in ("qwen3", "qwen3_5")
    small, layers = st.integers(1, 9), draw(st.integers(1, 6))
    kv, hk, experts = draw(small), draw(small), draw(st.integers(2, 9))
    vocab = draw(st.integers(1, 99))
    token = st.none() | st.integers(0, vocab - 1)
    data: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": vocab,
        "hidden_size": draw(small),
        "num_hidden_layers": layers,
        "num_attention_heads": kv * draw(small),
        "num_key_value_heads": kv,
        "head_dim": 8 * draw(small),
        "attention_bias": draw(st.booleans()),
        "rms_norm_eps": draw(st.floats(1e-9, 1e-2)),
        "max_position_embeddings": draw(st.integers(1, 10**6)),
        "rope_theta": draw(st.floats(1.0, 1e8) | st.integers(1, 10**7)),
        "partial_rotary_factor": draw(st.sampled_from([0.25, 0.5, 1.0])) if hybrid else 1.0,
        "intermediate_size": draw(small),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": draw(token),
        "eos_token_id": draw(token | st.lists(st.integers(0, vocab - 1), min_size=1, max_size=3)),
        "pad_token_id": draw(token),
        "num_nextn_predict_layers": draw(st.integers(0, 1)),
    }
    if draw(st.booleans()):
        data["rope_scaling"] = {**YARN, "factor": draw(st.floats(0.5, 40)), **draw(
            st.sampled_from([{}, {"attention_factor": 1.25}, {"beta_fast": 16.0, "beta_slow": 2.0}])
        )}  # fmt: skip
    if hybrid:
        kinds = st.sampled_from(["linear_attention", "full_attention"])
        data |= {
            "layer_types": draw(st.lists(kinds, min_size=layers, max_size=layers)),
            "linear_num_key_heads": hk,
            "linear_num_value_heads": hk * draw(st.integers(1, 4)),
            "linear_key_head_dim": draw(small),
            "linear_value_head_dim": draw(small),
            "linear_conv_kernel_dim": draw(st.integers(2, 5)),
        }
    if sparse:
        data |= {
            "num_experts": experts,
            "num_experts_per_tok": draw(st.integers(1, experts)),
            "moe_intermediate_size": draw(small),
            "norm_topk_prob": draw(st.booleans()),
            "mlp_only_layers": sorted(draw(st.sets(st.integers(0, layers - 1)))),
        }
        if hybrid:
            data["shared_expert_intermediate_size"] = draw(st.integers(0, 9))
    return ModelConfig.from_dict(data)


@settings(max_examples=300)
@given(config=configs())
def test_what_is_written_is_read_back(config: ModelConfig) -> None:
    data = json.loads(json.dumps(config.to_hf_dict()))
    assert ModelConfig.from_dict(data) == config


@pytest.mark.parametrize(
    "change", [{"attn_output_gate": False}, {"num_experts": 0, "mlp_only_layers": [0, 1, 2, 3]}]
)
def test_unusual_models_are_read_back(change: dict[str, Any]) -> None:
    config = read(**change)
    assert ModelConfig.from_dict(config.to_hf_dict()) == config


def test_both_transformers_find_their_keys() -> None:
    """4.57 knows rope_theta, partial_rotary_factor and rope_scaling; 5.x converts them."""
    data = read(rope_scaling=YARN).to_hf_dict()
    assert (data["rope_theta"], data["partial_rotary_factor"]) == (10000.0, 0.25)
    assert {k: data["rope_scaling"][k] for k in YARN} == YARN
    assert "rope_parameters" not in data


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HYBRID))
    assert ModelConfig.from_pretrained(tmp_path) == read()
    with pytest.raises(ConfigError, match="does not exist") as caught:
        ModelConfig.from_pretrained(tmp_path / "nowhere")
    assert caught.value.hint


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read().hidden_size = 3  # type: ignore[misc]
