"""What a checkpoint says about generating with it, and what "auto" means."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qnext.checkpoint.load import parse_dtype
from qnext.config import ModelConfig
from qnext.engine.sampling_params import SamplingParams
from qnext.errors import ConfigError

_TAKEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """End tokens and sampling values of one checkpoint.

    Attributes:
        eos_token_ids: every id that ends a text.
        sampling: values for SamplingParams.
    """

    eos_token_ids: tuple[int, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path, config: ModelConfig) -> GenerationDefaults:
        """Read the folder; a missing file leaves the config's own end token.

        Raises:
            ConfigError: the file is no JSON object or holds values that cannot be used.
        """
        path = folder / "generation_config.json"
        if not path.is_file():
            return cls(_ids(config.eos_token_id, folder / "config.json"))
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{path} must hold an object, found {type(found).__name__}")
        eos = found.get("eos_token_id")
        sampling = {name: found[name] for name in _TAKEN if found.get(name) is not None}
        if found.get("do_sample") is False:
            sampling = {"temperature": 0.0}
        if found.get("max_new_tokens") is not None:
            sampling["max_tokens"] = found["max_new_tokens"]
        return cls(_ids(config.eos_token_id if eos is None else eos, path), sampling)

    def sampling_params(self) -> SamplingParams:
        """SamplingParams with the checkpoint's values in place of vLLM's defaults."""
        return SamplingParams(**self.sampling)


def _ids(value: Any, path: Path) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if any(type(token) is not int for token in ids):
        raise ConfigError(f"{path}: eos_token_id={value!r} must be an integer or a list of them")
    return ids


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
    """The dtype to load in: the one place that decides what "auto" means on which device.

    The checkpoint's own on a GPU. On a CPU fp32: bfloat16 checkpoints lose nothing, torch's
    bfloat16 is slower for few rows, decoding reads bfloat16 copies anyway, and prompts multiply in
    bfloat16 where the processor can (``qnext.layers.fused``; not with an explicit "float32").

    Raises:
        ConfigError: no floating dtype of that name.
    """
    return parse_dtype(dtype) or ("float32" if device.type == "cpu" else "auto")


_KV_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
}


def resolve_kv_dtype(name: str) -> torch.dtype | None:
    """The dtype of keys and values by vLLM's names; None for the model's own.

    Raises:
        ConfigError: another name.
    """
    if name not in _KV_DTYPES:
        known = ", ".join(_KV_DTYPES)
        raise ConfigError(f"kv_cache_dtype={name!r} is not known", hint=f"one of: {known}")
    return _KV_DTYPES[name]


def longest_context(config: ModelConfig) -> int:
    """Most positions the model was made for; YaRN multiplies the original length by its factor."""
    yarn = config.rope_scaling
    if yarn is None:
        return config.max_position_embeddings
    scaled = int(yarn.original_max_position_embeddings * yarn.factor)
    return max(config.max_position_embeddings, scaled)
