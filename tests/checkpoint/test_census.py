"""The census of the published models, from arithmetic and on the meta device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from qnext.checkpoint import build_model
from qnext.checkpoint.census import active_parameter_count, detect_layout, parameter_count
from qnext.config import ModelConfig
from qnext.weights import disk_tensors

# Qwen/Qwen3-Next-80B-A3B-Instruct, every field of its config.json (spec 1.1).
NEXT_80B: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "full_attention_interval": 4,
    "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 5120, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
    "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_next",
    "moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16,
    "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48,
    "num_key_value_heads": 2, "output_router_logits": False, "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
CODER_NEXT = {**NEXT_80B, "rope_theta": 5000000, "eos_token_id": [151645, 151643]}
QWEN3: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 40960, "num_attention_heads": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_32B = {
    **QWEN3, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 5120,
    "intermediate_size": 25600, "max_window_layers": 64, "num_hidden_layers": 64,
    "num_key_value_heads": 8,
}  # fmt: skip
QWEN3_235B = {
    **QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
    "hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 94,
    "num_hidden_layers": 94, "num_key_value_heads": 4, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}  # fmt: skip
QWEN35_35B: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
    "image_token_id": 248056, "video_token_id": 248057, "vision_start_token_id": 248053,
    "vision_end_token_id": 248054, "tie_word_embeddings": False,
    "text_config": {
        "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
        "dtype": "bfloat16", "eos_token_id": 248044, "full_attention_interval": 4,
        "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144, "mlp_only_layers": [],
        "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 512,
        "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 16, "num_experts": 256, "num_experts_per_tok": 8,
        "num_hidden_layers": 40, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_parameters": {"mrope_interleaved": True, "mrope_section": [11, 11, 10],
                            "partial_rotary_factor": 0.25, "rope_theta": 10000000,
                            "rope_type": "default"},
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512,
        "use_cache": True, "vocab_size": 248320,
    },
    "vision_config": {"depth": 27, "hidden_size": 1152},
}  # fmt: skip
# All but 120 of the 128 experts of each layer.
ACTIVE_235B = 235_093_634_560 - 94 * 120 * 3 * 4096 * 1536
# By hand: embedding and head, final norm, layers of (30 DeltaNet | 10 attention) + MoE + norms.
DELTA, ATTENTION = 33_718_464, 27_263_488  # spec 1.4; the same widths here
MOE_256 = 256 * 3_145_728 + 256 * 2048 + 3_145_728 + 2048
LAYERS_35B = 30 * DELTA + 10 * ATTENTION + 40 * (MOE_256 + 4096)
MAIN_35B = 2 * 248_320 * 2048 + 2048 + LAYERS_35B
MTP_35B = 2 * 2048 * 2048 + 3 * 2048 + ATTENTION + MOE_256 + 4096

MODELS = {
    "Qwen3-Next-80B-A3B": (NEXT_80B, 79_674_391_296, 0, 3_874_929_408),
    "Qwen3-Coder-Next": (CODER_NEXT, 79_674_391_296, 0, 3_874_929_408),
    "Qwen3-32B": (QWEN3_32B, 32_762_123_264, 0, 32_762_123_264),
    "Qwen3-235B-A22B": (QWEN3_235B, 235_093_634_560, 0, ACTIVE_235B),
    "Qwen3.5-35B-A3B": (QWEN35_35B, MAIN_35B, MTP_35B, MAIN_35B - 40 * 248 * 3_145_728),
}


@pytest.mark.parametrize("name", MODELS)
def test_totals(name: str) -> None:
    data, main, mtp, active = MODELS[name]
    config = ModelConfig.from_dict(data)
    assert parameter_count(config) == (main, mtp)
    assert active_parameter_count(config) == active


@pytest.mark.parametrize("name", MODELS)
def test_built_on_meta(name: str) -> None:
    data, main, mtp, _ = MODELS[name]
    model = build_model(ModelConfig.from_dict(data), "bfloat16", "meta")
    assert sum(p.numel() for p in model.parameters()) == main + mtp
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def table_80b() -> dict[str, tuple[tuple[int, ...], int]]:
    """Spec 1.3: name with N for the layer and E for the expert -> shape, how often."""
    per_layer = {
        "input_layernorm.weight": (2048,), "post_attention_layernorm.weight": (2048,),
        "mlp.gate.weight": (512, 2048), "mlp.shared_expert.gate_proj.weight": (512, 2048),
        "mlp.shared_expert.up_proj.weight": (512, 2048),
        "mlp.shared_expert.down_proj.weight": (2048, 512),
        "mlp.shared_expert_gate.weight": (1, 2048),
    }  # fmt: skip
    attention = {
        "self_attn.q_proj.weight": (8192, 2048), "self_attn.k_proj.weight": (512, 2048),
        "self_attn.v_proj.weight": (512, 2048), "self_attn.o_proj.weight": (2048, 4096),
        "self_attn.q_norm.weight": (256,), "self_attn.k_norm.weight": (256,),
    }  # fmt: skip
    delta = {
        "linear_attn.in_proj_qkvz.weight": (12288, 2048),
        "linear_attn.in_proj_ba.weight": (64, 2048), "linear_attn.conv1d.weight": (8192, 1, 4),
        "linear_attn.A_log": (32,), "linear_attn.dt_bias": (32,), "linear_attn.norm.weight": (128,),
        "linear_attn.out_proj.weight": (2048, 4096),
    }  # fmt: skip
    expert = {"gate_proj": (512, 2048), "up_proj": (512, 2048), "down_proj": (2048, 512)}
    table: dict[str, tuple[tuple[int, ...], int]] = {
        "model.embed_tokens.weight": ((151936, 2048), 1),
        "lm_head.weight": ((151936, 2048), 1),
        "model.norm.weight": ((2048,), 1),
        "mtp.fc.weight": ((2048, 4096), 1),
        "mtp.pre_fc_norm_embedding.weight": ((2048,), 1),
        "mtp.pre_fc_norm_hidden.weight": ((2048,), 1),
        "mtp.norm.weight": ((2048,), 1),
    }
    for stem, layers, part in (
        ("model.layers.N.", 48, per_layer), ("model.layers.N.", 12, attention),
        ("model.layers.N.", 36, delta), ("mtp.layers.N.", 1, per_layer | attention),
    ):  # fmt: skip
        table |= {stem + name: (shape, layers) for name, shape in part.items()}
    for stem, layers in (("model.layers.N.", 48), ("mtp.layers.N.", 1)):
        for name, shape in expert.items():
            table[f"{stem}mlp.experts.E.{name}.weight"] = (shape, layers * 512)
    return table


def pattern(name: str) -> str:
    words, marks = name.split("."), {"layers": "N", "experts": "E"}
    return ".".join(marks.get(words[i - 1], w) if w.isdigit() else w for i, w in enumerate(words))


def test_every_tensor_of_the_80b_by_name_and_shape() -> None:
    config = ModelConfig.from_dict({**NEXT_80B, "num_nextn_predict_layers": 1})
    tensors = list(disk_tensors(config))
    assert len({t.name for t in tensors}) == len(tensors) == 75_944
    assert sum(t.name.startswith("mtp.") for t in tensors) == 1_553
    assert sum(t.numel for t in tensors) == 81_324_862_720
    assert 2 * sum(t.numel for t in tensors) == 162_649_725_440
    assert sum(t.numel for t in tensors if not t.name.startswith("mtp.")) == 79_674_391_296
    table = table_80b()
    counts = Counter(pattern(t.name) for t in tensors)
    assert counts == {name: count for name, (_, count) in table.items()}
    for tensor in tensors:
        assert tensor.shape == table[pattern(tensor.name)][0], tensor.name
    full = {int(t.name.split(".")[2]) for t in tensors if t.name.startswith("model.layers.")
            and "self_attn" in t.name}  # fmt: skip
    assert full == set(range(3, 48, 4))


def test_the_80b_with_mtp_on_meta() -> None:
    config = ModelConfig.from_dict({**NEXT_80B, "num_nextn_predict_layers": 1})
    assert parameter_count(config) == (79_674_391_296, 1_650_471_424)
    model = build_model(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 81_324_862_720
    names = {part.param for t in disk_tensors(config) for part in t.parts}
    assert names == {n for n, _ in model.named_parameters()}


def test_mtp_is_found_by_its_names_alone() -> None:
    config = ModelConfig.from_dict(NEXT_80B)
    assert config.num_mtp_layers == 0
    names = [t.name for t in disk_tensors(config.model_copy(update={"num_mtp_layers": 1}))]
    layout = detect_layout(config, names)
    assert layout.config.num_mtp_layers == 1
    assert set(layout.tensors) == set(names)


def test_qwen3_5_names() -> None:
    config = ModelConfig.from_dict(QWEN35_35B)
    assert config.norm_topk_prob
    assert config.rope_theta == 1e7
    disk = disk_tensors(config, prefix="model.language_model.", fused_experts=True)
    shapes = {t.name: t.shape for t in disk}
    stem = "model.language_model.layers.0."
    assert shapes[stem + "linear_attn.in_proj_qkv.weight"] == (8192, 2048)
    assert shapes[stem + "linear_attn.in_proj_z.weight"] == (4096, 2048)
    assert shapes[stem + "mlp.experts.gate_up_proj"] == (256, 1024, 2048)
    assert shapes["mtp.layers.0.mlp.experts.down_proj"] == (256, 2048, 512)
    assert detect_layout(config, shapes).prefix == "model.language_model."
