"""Random small models of transformers, one family and seed each."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import transformers
from tiny import randomise

KINDS = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
}


def draw_config(kind: str, seed: int) -> dict[str, Any]:
    """Arguments of the family's config class: odd widths, all head ratios, mixed layers."""
    rng = random.Random(f"{kind} {seed}")
    layers = rng.randint(2, 5)
    kv, head_dim = rng.randint(1, 3), rng.choice([8, 16, 24, 40])
    config: dict[str, Any] = {
        "vocab_size": rng.randint(50, 211),
        "hidden_size": rng.choice([17, 24, 31, 40, 53]),
        "num_hidden_layers": layers,
        "num_attention_heads": kv * rng.randint(1, 4),
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "intermediate_size": rng.randint(9, 40),
        "max_position_embeddings": 256,
        "tie_word_embeddings": seed % 3 == 1,
        "rms_norm_eps": rng.choice([1e-6, 1e-5]),
        "rope_parameters": draw_rope(rng, kind, seed),
    }
    if kind not in ("qwen3", "qwen3_moe"):
        config.update(
            linear_num_key_heads=(hk := rng.randint(1, 3)),
            linear_num_value_heads=hk * (1 + seed % 4),
            linear_key_head_dim=rng.choice([8, 13, 16]),
            linear_value_head_dim=rng.choice([8, 11, 24]),
            linear_conv_kernel_dim=2 + seed % 3,
            layer_types=rng.choices(["linear_attention", "full_attention"], [2, 1], k=layers),
        )
        # A cache of transformers needs an attention layer to know its length.
        config["layer_types"][rng.randrange(layers)] = "full_attention"
    if kind not in ("qwen3", "qwen3_5"):
        config.update(
            num_experts=(experts := rng.randint(3, 13)),
            num_experts_per_tok=rng.randint(1, min(experts, 4)),
            moe_intermediate_size=rng.randint(5, 21),
        )
    if kind in ("qwen3_next", "qwen3_5_moe"):
        config["shared_expert_intermediate_size"] = rng.randint(5, 21)
    if kind in ("qwen3_next", "qwen3_moe"):
        config.update(
            norm_topk_prob=seed % 4 != 3,
            decoder_sparse_step=2 if seed % 5 == 2 else 1,
            mlp_only_layers=[rng.randrange(layers)] if seed % 5 == 4 else [],
        )
    return config


def draw_rope(rng: random.Random, kind: str, seed: int) -> dict[str, Any]:
    """Plain RoPE, and YaRN for every fourth seed."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": rng.choice([1e4, 1e6, 1e7])}
    if kind not in ("qwen3", "qwen3_moe"):
        rope["partial_rotary_factor"] = rng.choice([0.25, 0.5, 1.0])
    if seed % 4 == 1:
        factor = rng.choice([2.0, 4.0])
        rope.update(rope_type="yarn", factor=factor, original_max_position_embeddings=64)
    return rope


def draw_model(kind: str, seed: int, **changes: Any) -> Any:
    """A random model in evaluation mode, fp32, computed by plain torch."""
    config_class, model_class = (getattr(transformers, name) for name in KINDS[kind])
    config = config_class(**{**draw_config(kind, seed), **changes})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = model_class(config).eval().requires_grad_(False)
    randomise(model, seed)
    return model


def reload(model: Any, folder: Path) -> Any:
    """The folder as the same class of transformers reads it."""
    loaded, report = type(model).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager",
        experts_implementation="eager",
    )  # fmt: skip
    report = {k: v for k, v in report.items() if v}
    assert not report, report
    return loaded.eval()
