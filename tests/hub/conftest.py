"""Servers, and clients that know no other place than them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from loopback_hubs import HubServer, KaggleServer, ModelScopeServer


@pytest.fixture
def files() -> dict[str, bytes]:
    """A repository: two shards (the second holds mtp.*), small files, and files never to fetch."""
    weight_map = {
        "model.embed_tokens.weight": "model-00001-of-00002.safetensors",
        "mtp.fc.weight": "model-00002-of-00002.safetensors",
    }
    return {
        "config.json": b'{"model_type": "qwen3_next"}',
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        "model-00001-of-00002.safetensors": bytes(range(256)) * 3000,
        "model-00002-of-00002.safetensors": bytes(reversed(range(256))) * 2000,
        "tokenizer.json": b"{}",
        "vocab.json": b'{"a": 0}',
        "merges.txt": b"a b\n",
        "chat_template.jinja": b"{{ messages }}",
        "README.md": b"# card\n",
        "LICENSE": b"Apache-2.0\n",
        ".gitattributes": b"* text\n",
        "pytorch_model.bin": b"\x80pickle",
        "weights.pt": b"\x80pickle",
        "modeling_evil.py": b"raise SystemExit\n",
        "tokenizer.pkl": b"\x80pickle",
    }


FETCHED = {
    "config.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
}


@pytest.fixture
def fetched() -> set[str]:
    """The files of the repository that may be fetched."""
    return FETCHED


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face server, and the client set to it with an empty cache and no token."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield server


@pytest.fixture
def modelscope(tmp_path, monkeypatch):
    """A ModelScope server, and the client set to it with an empty cache."""
    from modelscope_hub.config import set_default_config

    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "ms-home"))
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    with ModelScopeServer() as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        set_default_config(None)
        yield server
    set_default_config(None)


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A Kaggle server, and the client set to it with an empty cache."""
    from kagglesdk import kaggle_env

    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "no-kaggle"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    with KaggleServer() as server:
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, server.url)
        yield server
