"""Tiny models with every part of the architecture, and weights that make each part matter."""

from __future__ import annotations

from typing import Any

import torch

from qnext.checkpoint import build_model
from qnext.config import ModelConfig
from qnext.layers.model import CausalLM
from qnext.layers.packed import PackedBatch

HYBRID: dict[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "shared_expert_intermediate_size": 14,
    "norm_topk_prob": True,
    "mlp_only_layers": [2],
    "intermediate_size": 18,
    "max_position_embeddings": 512,
    "num_nextn_predict_layers": 1,
}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter: matrices with a gain near one, vectors around where they start.

    With a gain of one and more the gated norm meets outputs near zero, and then rounding in
    fp32 alone (transformers against its own fp64) exceeds the tolerances of these tests.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=rng, dtype=torch.float32).to(p.dtype)
            if p.ndim == 1:
                p.add_(0.2 * noise)
            elif "conv1d" in name or "embed_tokens" in name:
                p.copy_(0.5 * noise)
            else:
                gain = 1.0 if "lm_head" in name else 0.7
                p.copy_(gain * noise * p.shape[-1] ** -0.5)


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> CausalLM:
    """A random model in evaluation mode."""
    config = ModelConfig.from_dict({**HYBRID, **changes})
    model = build_model(config, dtype).eval().requires_grad_(False)
    randomise(model, seed)
    return model


def draw_ids(model: CausalLM, count: int, seed: int = 0) -> torch.Tensor:
    """(count,) random token ids."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (count,), generator=rng)


def whole(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    """(T, hidden) normed states of one sequence, without a cache."""
    return model.hidden_states(ids, PackedBatch.of([len(ids)]))
