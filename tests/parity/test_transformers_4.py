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
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "yarn": {"rope_scaling": YARN},
    "tied, value heads 3 to 1": {"tie_word_embeddings": True, "linear_num_value_heads": 6},
    "qwen3": {"model_type": "qwen3", "layer_types": None, "partial_rotary_factor": 1.0},
    "qwen3_moe": {"model_type": "qwen3_moe", "layer_types": None, "partial_rotary_factor": 1.0,
                  "shared_expert_intermediate_size": 0, "rope_scaling": YARN},
}  # fmt: skip


@pytest.fixture(scope="module")
def transformers_4(repository: Path) -> Path:
    """The folder that holds transformers 4.57 and what it pins."""
    folder = repository / ".venv" / "hf4"
    if not (folder / "transformers").is_dir():
        pytest.fail(f"run: pip install --no-deps --target {folder} {WHEELS}")
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shard", [5_000_000, 20_000])
def test_it_loads_our_folder_with_the_same_logits(
    case: str, shard: int, transformers_4: Path, tmp_path: Path
) -> None:
    if CASES[case].get("model_type"):
        changes = {"num_nextn_predict_layers": 0, **CASES[case]}
    else:
        changes = {"num_nextn_predict_layers": 1, **CASES[case]}  # it ignores mtp.*
    model = tiny_model(torch.float32, **changes)
    save_model(model, tmp_path / "model", max_shard_size=shard)
    ids = torch.randint(61, (2, 70), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    script = Path(__file__).with_name("transformers_4_logits.py")
    files = [tmp_path / "model", tmp_path / "ids.safetensors", tmp_path / "logits.safetensors"]
    run = subprocess.run(
        [sys.executable, script, *files], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(transformers_4), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    theirs = load_file(files[2])["logits"]
    assert theirs.std() > 0.1
    torch.testing.assert_close(model(ids).logits, theirs, rtol=0, atol=1e-4)
