"""transformers 4.57 reads the folders that we write, with the same logits.

It cannot be installed beside transformers 5, so it lies in a folder of its own and runs in a
process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from qnext.checkpoint import save_model

WHEELS = "transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
PLAIN = {"layer_types": None, "num_nextn_predict_layers": 0, "partial_rotary_factor": 1.0,
         "shared_expert_intermediate_size": 0}  # fmt: skip
# transformers 4.57 ignores mtp.* of Qwen3-Next; the cases alternate single files and shards.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, sharded": {"norm_topk_prob": False},
    "yarn": {"rope_scaling": YARN},
    "yarn factor 2, sharded": {"rope_scaling": {**YARN, "factor": 2.0}},
    "three value heads a key head, tied": {"tie_word_embeddings": True,
                                           "linear_num_value_heads": 6},
    "qwen3": {**PLAIN, "model_type": "qwen3"},
    "qwen3_moe": {**PLAIN, "model_type": "qwen3_moe"},
    "qwen3_moe, yarn": {**PLAIN, "model_type": "qwen3_moe", "rope_scaling": YARN},
}  # fmt: skip


@pytest.fixture(scope="module")
def logits(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Case -> (ours, theirs), single files and shards, from one run of transformers 4.57."""
    wheels = repository / ".venv" / "hf4"
    if not (wheels / "transformers").is_dir():
        pytest.fail(f"run: pip install --no-deps --target {wheels} {WHEELS}")
    root = tmp_path_factory.mktemp("transformers_4")
    ids = torch.randint(61, (2, 70), generator=torch.Generator().manual_seed(0))
    ours, folders = {}, {}
    for number, (case, changes) in enumerate(CASES.items()):
        model = tiny_model(torch.float32, **changes)
        ours[case] = model(ids).logits
        folders[case] = root / str(number)
        save_model(model, folders[case] / "model", max_shard_size=(5_000_000, 20_000)[number % 2])
        save_file({"ids": ids}, folders[case] / "ids.safetensors")
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("transformers_4_logits.py"), *folders.values()],
        capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": str(wheels), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return {c: (ours[c], load_file(f / "logits.safetensors")["logits"]) for c, f in folders.items()}


@pytest.mark.parametrize("case", CASES)
def test_it_loads_our_folder_with_the_same_logits(case: str, logits: dict[str, Any]) -> None:
    ours, theirs = logits[case]
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
