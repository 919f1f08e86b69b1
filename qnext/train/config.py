"""The recipe: a strict TOML file that describes one training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qnext.parallel.mesh import ParallelConfig
from qnext.parallel.recompute import Kind
from qnext.train.recipe import read_recipe, write_recipe


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceConfig(_Section):
    """One part of a mixture."""

    shards: str
    weight: float = Field(default=1.0, gt=0)
    """Share of the tokens, on any scale."""


class DataConfig(_Section):
    """Token shards as ``qnext data`` writes them: one folder, or a mixture of several."""

    shards: str | None = None
    """Folder with ``train.bin``, ``train.offsets.npy``, ``heldout.*`` and ``manifest.json``."""
    sources: tuple[SourceConfig, ...] = ()
    """Instead of ``shards``: several such folders and their weights."""
    tokenizer: str
    """Folder whose tokenizer files are copied to the export."""
    seq_len: int = Field(default=1024, gt=0)
    """Tokens of the longest sequence."""
    long_documents: Literal["cut", "refuse"] = "cut"
    """What happens to a document of more than ``seq_len`` tokens: cut into even pieces, or the
    run is refused."""
    batch_tokens: int = Field(gt=0)
    """Tokens of one optimizer step."""
    micro_batches: int = Field(default=1, gt=0)
    """Pieces that a step is computed in; data-parallel ranks share them out."""

    @model_validator(mode="after")
    def _one_origin(self) -> DataConfig:
        if bool(self.sources) == bool(self.shards):
            raise ValueError("give either shards or sources")
        return self

    @property
    def mixture(self) -> tuple[SourceConfig, ...]:
        """All parts, also where there is only one."""
        return self.sources or (SourceConfig(shards=str(self.shards)),)


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
    """Share of the run in which the rate falls to ``final_lr_ratio``."""
    decay: Literal["linear", "cosine", "sqrt"] = "linear"
    """How it falls; sqrt is one minus the square root of the share that has passed."""
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


class StabilityConfig(_Section):
    """When a run goes back to its last good checkpoint and on with other data."""

    loss_factor: float = Field(default=0.0, ge=0)
    """A loss so many times its running mean is a jump; 0 never."""
    loss_warmup: int = Field(default=10, ge=0)
    """Readings of the loss before jumps are looked for."""
    max_rollbacks: int = Field(default=3, ge=0)
    """A run that fails once more ends."""


class ReportConfig(_Section):
    """Where the figures go besides ``metrics.jsonl``."""

    tensorboard: bool = True
    """Event files under ``output/tensorboard``, if tensorboard is installed."""
    plots: bool = True
    """Pictures and ``report.html`` at the end of a call."""
    wandb_project: str | None = None
    """Project of Weights & Biases; needs the package and, unless offline, an account."""


class TrainConfig(_Section):
    """One run. ``model`` is a table in the words of ``config.json``."""

    output: str
    model: dict[str, Any] = {}
    init_from: str | None = None
    """Instead of ``model``: folder or hub id whose config and weights the run begins with."""
    data: DataConfig
    optimizer: OptimizerConfig
    loss: LossConfig = LossConfig()
    stability: StabilityConfig = StabilityConfig()
    parallel: ParallelConfig = ParallelConfig()
    report: ReportConfig = ReportConfig()
    recompute: tuple[Kind, ...] = ()
    """Modules whose activations are forgotten and computed again in the backward pass."""
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

    @model_validator(mode="after")
    def _one_start(self) -> TrainConfig:
        if bool(self.model) == bool(self.init_from):
            raise ValueError("give either model or init_from")
        return self


def load_recipe(path: Path, overrides: list[str]) -> TrainConfig:
    """Read a training recipe and apply ``section.key=value`` overrides.

    Raises:
        ConfigError: no such file, not TOML, an unknown or missing key, a bad value.
    """
    return read_recipe(TrainConfig, path, overrides)


def dump_recipe(config: TrainConfig) -> str:
    """The resolved recipe as TOML; reading it gives the same config."""
    return write_recipe(config)
