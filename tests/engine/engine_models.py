"""Tiny random models of the full architecture, and runs through the step loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qnext.checkpoint import build_model
from qnext.config import ModelConfig
from qnext.engine.generate import Engine
from qnext.engine.options import EngineOptions
from qnext.engine.request import Request
from qnext.engine.sampling_params import SamplingParams
from qnext.layers.model import CausalLM
from qnext.layers.packed import PackedBatch

VOCAB = 40
"""Ids that may be sampled; the tiny models have more rows, as the real one has padding."""

TINY: dict[str, Any] = {
    "model_type": "qwen3_next",
    "architectures": ["Qwen3NextForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "rope_scaling": None,
    "full_attention_interval": 2,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "intermediate_size": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_nextn_predict_layers": 1,
    "eos_token_id": 39,
    "bos_token_id": 38,
    "pad_token_id": 38,
}


def tiny_model(seed: int = 0, **changes: Any) -> CausalLM:
    """A random fp32 model whose weights are large enough to prefer some tokens clearly."""
    config = ModelConfig.from_dict({**TINY, **changes})
    model = build_model(config, seed=seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(0.12 / parameter.std())
        head(model).mul_(5)
    return model


def head(model: CausalLM) -> torch.Tensor:
    """Weight of the output head (rows, hidden)."""
    assert model.lm_head is not None
    return model.lm_head.weight


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 38, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def logits_of(model: CausalLM, tokens: Sequence[int], vocab: int = VOCAB) -> torch.Tensor:
    """(T, vocab) logits of a full forward without a cache."""
    batch = PackedBatch.of([len(tokens)])
    return model.logits(model.hidden_states(torch.tensor(tokens), batch))[:, :vocab].float()


def greedy_oracle(
    model: CausalLM, prompt: Sequence[int], count: int, vocab: int = VOCAB
) -> list[int]:
    """``count`` greedy tokens, each by a full forward."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(model, tokens, vocab)[-1].argmax()))
    return tokens[len(prompt) :]


def new_engine(model: CausalLM, **options: Any) -> Engine:
    return Engine(model, EngineOptions(**{"vocab_size": VOCAB, "max_model_len": 200, **options}))


def drain(engine: Engine) -> None:
    """Step until nothing is left; every slot must be free at the end."""
    for _ in range(5000):
        if not engine.has_work:
            break
        engine.step()
    assert not engine.has_work
    engine.cache.check()
    assert not engine.cache.leases


def run(
    model: CausalLM,
    prompts: Sequence[list[int]],
    params: SamplingParams | Sequence[SamplingParams],
    **options: Any,
) -> list[Request]:
    engine = new_engine(model, **options)
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    requests = [engine.add_request(p, one) for p, one in zip(prompts, each, strict=True)]
    drain(engine)
    return requests


def outputs(requests: Sequence[Request]) -> list[list[list[int]]]:
    return [[sequence.output_ids for sequence in request.sequences] for request in requests]
