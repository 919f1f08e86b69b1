"""A toy corpus that a tiny model can learn, and a recipe for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 32
MODEL: dict[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "tie_word_embeddings": True,
    "num_nextn_predict_layers": 1,
    "eos_token_id": VOCAB - 1,
}


def write_shards(folder: Path, documents: list[list[int]], split: str = "train") -> None:
    """Write one split in the format of ``tokenize_shards``."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = np.array([t for d in documents for t in d], dtype=np.uint16).reshape(-1)
    flat.tofile(folder / f"{split}.bin")
    bounds = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    np.save(folder / f"{split}.offsets.npy", bounds)
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text()) if file.exists() else {}
    manifest[split] = {"documents": len(documents), "tokens": len(flat), "bytes": 3 * len(flat)}
    file.write_text(json.dumps(manifest))


def toy_documents(count: int, seed: int) -> list[list[int]]:
    """Walks of a fixed permutation: token n decides token n + 1."""
    after = np.random.default_rng(0).permutation(VOCAB - 1)
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        walk = [int(rng.integers(VOCAB - 1))]
        for _ in range(int(rng.integers(3, 60))):
            walk.append(int(after[walk[-1]]))
        out.append([*walk, VOCAB - 1])
    return out


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Corpus and recipe under ``folder``; top-level keys can be changed."""
    write_shards(folder / "shards", toy_documents(80, 1), "train")
    write_shards(folder / "shards", toy_documents(6, 2), "heldout")
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    top = {"output": str(folder / "run"), "steps": 12, "seed": 3, "log_every": 4, **changes}
    lines = [f"{k} = {json.dumps(v)}" for k, v in top.items()]
    lines += ["[model]", *(f"{k} = {json.dumps(v)}" for k, v in MODEL.items())]
    lines += ["[data]", f'shards = "{folder / "shards"}"', f'tokenizer = "{folder / "tokenizer"}"']
    lines += ["seq_len = 32", "batch_tokens = 128", "micro_batches = 2"]
    lines += ["[optimizer]", "lr = 1e-2", "warmup_steps = 2"]
    lines += ["[loss]", "mtp_depth = 2", "mtp_weight = 0.3"]
    lines += ["[report]", "tensorboard = false", "plots = false"]  # they take a second each
    file = folder / "recipe.toml"
    file.write_text("\n".join(lines) + "\n")
    return file
