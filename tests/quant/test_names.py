"""Ignore lists: whole components, fused and split names, prefixes of multimodal checkpoints."""

from __future__ import annotations

import pytest

from qnext.errors import ConfigError
from qnext.quant.names import NameList

LAYER = "model.layers.3."
MATCHES = [
    ("lm_head", "lm_head", True),
    ("model.layers.3.mlp.gate", LAYER + "mlp.gate", True),
    ("model.layers.3.mlp.gate", LAYER + "mlp.gate_proj", False),
    ("model.layers.3.mlp.gate", "model.layers.31.mlp.gate", False),
    ("mlp.gate", LAYER + "mlp.gate", True),
    ("mlp.gate", LAYER + "mlp.gate_proj", False),
    ("mlp.gate", LAYER + "mlp.gate_up_proj", False),
    ("gate", LAYER + "mlp.shared_expert_gate", False),
    ("model.layers.3", LAYER + "self_attn.q_proj", True),
    ("model.layers.3", "model.layers.30.self_attn.q_proj", False),
    ("model.layers.3.self_attn", "mtp.layers.3.self_attn.q_proj", False),
    ("mtp", "mtp.layers.0.self_attn.q_proj", True),
    ("mtp.layers.0.mlp.gate", "model.layers.0.mlp.gate", False),
    ("self_attn", LAYER + "self_attn.q_proj", True),
    ("q_proj", LAYER + "self_attn.q_proj", True),
    ("self_attn.qkv_proj", LAYER + "self_attn.k_proj", True),
    ("self_attn.qkv_proj", LAYER + "self_attn.o_proj", False),
    ("gate_up_proj", LAYER + "mlp.experts.7.up_proj", True),
    ("linear_attn.in_proj_ba", LAYER + "linear_attn.in_proj_b", True),
    ("linear_attn.in_proj_qkvz", LAYER + "linear_attn.in_proj_z", True),
    ("model.language_model.layers.3.mlp.gate", LAYER + "mlp.gate", True),
    ("language_model.model.layers.3.mlp.gate", "model.language_model.layers.3.mlp.gate", True),
    ("model.layers.3.mlp.gate", "model.language_model.layers.3.mlp.gate", True),
    ("language_model.lm_head", "lm_head", True),
    ("re:.*mlp.gate$", LAYER + "mlp.gate", True),
    ("re:.*mlp.gate$", LAYER + "mlp.gate_proj", False),
    ("re:mtp.*", LAYER + "mtp", False),
    ("re:mtp.*", "mtp.fc", True),
    ("re:.*in_proj_ba", LAYER + "linear_attn.in_proj_a", True),
    ("model.visual", LAYER + "mlp.gate", False),
    ("", LAYER + "mlp.gate", False),
]


@pytest.mark.parametrize(("entry", "module", "expected"), MATCHES)
def test_an_entry(entry: str, module: str, expected: bool) -> None:
    assert (module in NameList([entry], "ignore")) is expected


def test_split_names_of_a_fused_module() -> None:
    module = LAYER + "linear_attn.in_proj_ba"
    assert module in NameList([f"{LAYER}linear_attn.in_proj_{x}" for x in "ab"], "ignore")
    with pytest.raises(ConfigError, match=r"in_proj_a of .*in_proj_ba, which is one tensor"):
        _ = module in NameList(["linear_attn.in_proj_a"], "ignore")
    with pytest.raises(ConfigError, match=r"k_proj of .*qkv_proj"):
        _ = LAYER + "self_attn.qkv_proj" in NameList(["k_proj"], "ignore")


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"re:\["):
        NameList(["re:["], "ignore")
