"""Planned bytes beside used ones on one GPU: layers of the 80B, BF16, random weights.

    python benchmarks/gpu_plan.py [--layers 4] [--tokens 8192] [--context 32768]

One block of the 80B's layers (three DeltaNet, one attention) is as wide as all twelve, so the
working memory of a step is that of the whole model.
"""

from __future__ import annotations

import argparse
import json

import torch

from qnext.checkpoint.load import empty_model
from qnext.config import ModelConfig
from qnext.engine.plan import compare, free_memory, measure, plan_memory, preset
from qnext.layers.model import CausalLM


def cut(config: ModelConfig, layers: int, experts: int) -> ModelConfig:
    """The first layers of a model, with fewer experts in memory (as many per token)."""
    return config.model_copy(
        update={
            "num_hidden_layers": layers, "layer_types": config.layer_types[:layers],
            "sparse_layers": config.sparse_layers[:layers], "num_experts": experts,
        }
    )  # fmt: skip


def random_model(config: ModelConfig, device: torch.device) -> CausalLM:
    """Random weights, small enough to stay finite."""
    model = empty_model(config, torch.bfloat16, {}, device).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=32768)
    asked = parser.parse_args()
    device = torch.device("cuda")
    before = free_memory(device)
    config = cut(preset("80b"), asked.layers, asked.experts)
    model = random_model(config, device)
    torch.cuda.synchronize()
    plan = plan_memory(
        config, memory_bytes=free_memory(device), weights_loaded=True, enforce_eager=True,
        max_model_len=asked.context, max_num_seqs=4, full_seqs=4, snapshots=0,
        enable_prefix_caching=False, max_num_batched_tokens=asked.tokens,
    ).require()  # fmt: skip
    state = model.new_state(plan.num_slots, num_blocks=plan.num_blocks, block_size=plan.block_size)
    facts = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__,
             "free_before": before, "total": torch.cuda.mem_get_info()[1]}  # fmt: skip
    for name, past in (("first piece", 0), ("last piece", asked.context - asked.tokens)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            ids = torch.randint(config.vocab_size, (asked.tokens,), device=device)
            batch = state.batch([asked.tokens], slots=[0], context_lens=[past])
            hidden = model.hidden_states(ids, batch, state)
            model.logits(hidden[-4:]).float().sort(-1)
            del hidden
        torch.cuda.synchronize()
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        free, total = torch.cuda.mem_get_info()
        facts[name] = {"reserved_over_allocated": reserved - peak,
                       "outside_torch": total - free - torch.cuda.memory_reserved()}  # fmt: skip
        print(f"{name}: {past} tokens before\n{compare(plan, measure(model, state, peak))}\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
