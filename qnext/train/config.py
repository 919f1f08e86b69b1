"""The recipe: a strict TOML file that describes one training run."""

from __future__ import annotations

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qnext.errors import ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Section):
    """Token shards as ``qnext.train.tokenizer.tokenize_shards`` writes them."""

    shards: str
    """Folder with ``train.bin``, ``train.offsets.npy``, ``heldout.*`` and ``manifest.json``."""
    tokenizer: str
    """Folder whose tokenizer files are copied to the export."""
    seq_len: int = Field(default=1024, gt=0)
    """Tokens of the longest sequence; longer documents are cut."""
    batch_tokens: int = Field(gt=0)
    """Tokens of one optimizer step."""
    micro_batches: int = Field(default=1, gt=0)
    """Pieces that a step is computed in."""


class OptimizerConfig(_Section):
    """AdamW (or Muon for the hidden matrices) with warm-up, stable phase and linear decay."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: AdamW is left with embedding, head, router, norms and other vectors."""
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = Field(default=0.1, ge=0)
    grad_clip: float = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    decay_fraction: float = Field(default=0.3, ge=0, le=1)
    """Share of the run in which the rate falls linearly to ``final_lr_ratio``."""
    final_lr_ratio: float = Field(default=0.02, ge=0)
    spike_factor: float = Field(default=0.0, ge=0)
    """Skip a step whose gradient norm is so many times its running mean; 0 never."""


class LossConfig(_Section):
    """Weights of the auxiliary losses."""

    mtp_weight: float = Field(default=0.1, ge=0)
    mtp_depth: int = Field(default=1, ge=0)
    """How many steps the MTP module is unrolled (spec section 6.5)."""
    load_balance: float = Field(default=1e-3, ge=0)
    """Of ``E * sum_e f_e P_e`` per sparse layer (arXiv 2501.11873)."""
    router_z: float = Field(default=0.0, ge=0)


class TrainConfig(_Section):
    """One run. ``model`` is a table in the words of ``config.json``."""

    output: str
    model: dict[str, Any]
    data: DataConfig
    optimizer: OptimizerConfig
    loss: LossConfig = LossConfig()
    steps: int = Field(gt=0)
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    """Of the forward pass: auto is bfloat16 on CUDA and float32 on a CPU; masters are fp32."""
    log_every: int = Field(default=10, gt=0)
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on held-out text; 0 only at the end."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Steps between checkpoints to resume from; 0 only at the end."""
    stop_after_s: float = Field(default=0.0, ge=0)
    """Write a checkpoint and stop after so many seconds; a second call goes on. 0: never."""
    time_limit_s: float = Field(default=0.0, ge=0)
    """Seconds for the whole run, all calls together: the decay begins in time to end by then,
    with fewer than ``steps`` steps if need be. 0: ``steps`` alone decides."""


def load_recipe(path: Path, overrides: list[str]) -> TrainConfig:
    """Read a recipe and apply ``section.key=value`` overrides.

    Raises:
        ConfigError: no such file, not TOML, an unknown or missing key, a bad value.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"recipe {path} does not exist") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not TOML: {error}") from error
    for item in overrides:
        _override(data, item)
    try:
        return TrainConfig(**data)
    except ValidationError as error:
        raise ConfigError(f"recipe {path}: {_explain(error)}") from error


def dump_recipe(config: TrainConfig) -> str:
    """The resolved recipe as TOML; reading it gives the same config."""
    data = config.model_dump()
    lines = [f"{k} = {_toml(v)}" for k, v in data.items() if not isinstance(v, dict)]
    for name, table in data.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]"]
            lines += [f"{k} = {_toml(v)}" for k, v in table.items() if v is not None]
    return "\n".join(lines) + "\n"


def _override(data: dict[str, Any], item: str) -> None:
    path, equals, text = item.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {item!r} is not of the form key.sub=value")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override {item!r}: {key} is not a section")
    data[keys[-1]] = value


def _explain(error: ValidationError) -> str:
    known: dict[tuple[int | str, ...], type[BaseModel]] = {
        (): TrainConfig, ("data",): DataConfig, ("optimizer",): OptimizerConfig,
        ("loss",): LossConfig,
    }  # fmt: skip
    parts = []
    for item in error.errors():
        name = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            owner = known.get(tuple(item["loc"][:-1]), TrainConfig)
            near = difflib.get_close_matches(str(item["loc"][-1]), owner.model_fields, 1)
            parts.append(f"unknown key {name}" + (f" (did you mean {near[0]}?)" if near else ""))
        elif item["type"] == "missing":
            parts.append(f"{name} is missing")
        else:
            parts.append(f"{name} = {item['input']!r}: {item['msg']}")
    return "; ".join(parts)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    return json.dumps(list(value) if isinstance(value, tuple) else value)
