"""Tiny configs of every family that can be planned."""

from __future__ import annotations

from typing import Any

from tiny import HYBRID

from qnext.config import ModelConfig

DENSE = {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0,
         "shared_expert_intermediate_size": 0, "mlp_only_layers": None}  # fmt: skip
PLAIN = {"layer_types": ["full_attention"] * 4, "partial_rotary_factor": 1.0,
         "num_nextn_predict_layers": 0, "shared_expert_intermediate_size": None}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {},
    "qwen3_next, tied, no MTP": {"tie_word_embeddings": True, "num_nextn_predict_layers": 0},
    "qwen3_5": {"model_type": "qwen3_5", **DENSE},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe"},
    "qwen3": {"model_type": "qwen3", **DENSE, **PLAIN, "attention_bias": True},
    "qwen3_moe": {"model_type": "qwen3_moe", **PLAIN},
}


def config_of(**changes: Any) -> ModelConfig:
    data = {k: v for k, v in {**HYBRID, **changes}.items() if v is not None}
    return ModelConfig.from_dict(data)
