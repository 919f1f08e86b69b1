"""One step, one loop."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qnext.checkpoint import build_model, save_model
from qnext.checkpoint.load import parse_device, parse_dtype
from qnext.config import ModelConfig
from qnext.errors import ConfigError, TrainingError
from qnext.train.config import TrainConfig, dump_recipe
from qnext.train.data import PackedLoader, TokenShards, TrainBatch, prefetch
from qnext.train.evaluate import Evaluation, evaluate
from qnext.train.loss import compute_losses
from qnext.train.optim import MasterOptimizer
from qnext.train.report import PEAK, Report, flops_per_token, plot
from qnext.train.resume import load_checkpoint, save_checkpoint
from qnext.train.schedule import learning_rate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a call of the trainer left behind.

    Attributes:
        model: exported Hugging Face folder.
        steps: optimizer steps done so far, all calls together.
        finished: False if ``stop_after_s`` ended the call early; call again to go on.
        skipped: steps whose update was left out.
        evaluation: figures on held-out text.
    """

    model: Path
    steps: int
    finished: bool
    skipped: int
    evaluation: Evaluation


class Trainer:
    """Trains one model on one device as its recipe says, and goes on where it stopped.

    Raises:
        ConfigError: a recipe that does not fit together.
        TrainingError: data that do not fit the model.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = parse_device(config.device)
        self.output = Path(config.output)
        self.model_config = ModelConfig.from_dict(config.model)
        if config.data.batch_tokens % config.data.micro_batches:
            raise ConfigError(
                f"data.batch_tokens {config.data.batch_tokens} does not divide into "
                f"{config.data.micro_batches} micro batches"
            )
        dtype = parse_dtype(config.dtype)
        if dtype is None:
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.depth = config.loss.mtp_depth if self.model_config.num_mtp_layers else 0
        parts = config.data.mixture
        self.sources = [(TokenShards(part.shards, "train"), part.weight) for part in parts]
        self.heldout = [TokenShards(part.shards, "heldout") for part in parts]
        self._check_data()
        self.model = build_model(self.model_config, "float32", self.device, seed=config.seed)
        self.optimizer = MasterOptimizer(self.model, config.optimizer, dtype)
        self.loader = PackedLoader(
            self.sources,
            config.data.batch_tokens // config.data.micro_batches,
            config.data.seq_len,
            self.depth,
            config.seed,
        )
        self.step_done = 0
        self.elapsed = 0.0
        self.position = self.loader.state_dict()
        self._skipped = 0.0

    def _check_data(self) -> None:
        """Data that do not fit the model, before anything is built."""
        data, model = self.config.data, self.model_config
        if data.seq_len > model.max_position_embeddings:
            raise ConfigError(
                f"data.seq_len {data.seq_len} is more than model.max_position_embeddings "
                f"{model.max_position_embeddings}"
            )
        for shards, _ in self.sources:
            if not len(shards):
                raise TrainingError(f"{shards.folder} has no documents to train on")
            largest = int(shards.tokens[: 1 << 22].max(initial=0))
            if largest >= model.vocab_size:
                raise TrainingError(
                    f"{shards.folder}: the shards hold token {largest}, the model's vocabulary "
                    f"ends at {model.vocab_size - 1}",
                    hint="tokenise with the recipe's tokenizer, or correct model.vocab_size",
                )
            sizes = np.diff(shards.offsets)
            if data.long_documents == "refuse" and sizes.max() > data.seq_len:
                raise TrainingError(
                    f"{shards.folder}: document {int(sizes.argmax())} has {int(sizes.max())} "
                    f"tokens, data.seq_len is {data.seq_len}",
                    hint='raise data.seq_len, or set data.long_documents = "cut"',
                )
        if not any(len(part) for part in self.heldout):
            raise TrainingError(
                f"{self.heldout[0].folder} has no held-out documents",
                hint="prepare the data with a heldout_share above 0",
            )

    def run(self) -> TrainResult:
        """Train to the end (or to ``stop_after_s``), evaluate, export."""
        config = self.config
        self.output.mkdir(parents=True, exist_ok=True)
        self._resume()
        (self.output / "run.toml").write_text(dump_recipe(config), encoding="utf-8")
        peak = None
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            peak = next((v for k, v in PEAK.items() if k in name), None)
            torch.set_float32_matmul_precision("high")
        flops = flops_per_token(self.model_config, config.data.seq_len, self.depth)
        report = Report(self.output, config.steps, self.step_done, flops, peak, self.progress())
        with closing(report):
            self._loop(report)
            self.checkpoint()
            result = self.evaluate()
            report.write({"step": self.step_done, "heldout": result.to_dict()})
        log.info("heldout %s", json.dumps(result.to_dict()))
        plot(self.output)
        skipped = int(self.optimizer.skipped)
        return TrainResult(
            self.export(result), self.step_done, self.progress() >= 1, skipped, result
        )

    def _loop(self, report: Report) -> None:
        """Steps until the run is done or this call has had its time."""
        config = self.config
        batches = prefetch(self.loader, pin=self.device.type == "cuda")
        started, before = time.perf_counter(), self.elapsed
        late = False
        try:
            while self.progress() < 1 and not late:
                values = self._step(batches)
                step = self.step_done
                spent = time.perf_counter() - started
                self.elapsed = before + spent
                late = bool(config.stop_after_s) and spent > config.stop_after_s
                if step % config.log_every == 0 or self.progress() >= 1:
                    row = report.step(
                        step, config.data.batch_tokens, _numbers(values), self.progress()
                    )
                    self._watch(row)
                if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                    report.write({"step": step, "heldout": self.evaluate().to_dict()})
                if config.checkpoint_every and step % config.checkpoint_every == 0:
                    self.checkpoint()
        finally:
            batches.close()
        if late:
            log.info("stopped step=%d after %.0f s", self.step_done, config.stop_after_s)

    def progress(self) -> float:
        """Share of the run that is done: by steps, or by the clock if that is further."""
        limit = self.config.time_limit_s
        return max(self.step_done / self.config.steps, self.elapsed / limit if limit else 0.0)

    def _step(self, batches: Iterator[tuple[TrainBatch, dict[str, int]]]) -> dict[str, Any]:
        """One optimizer step; every value stays on the device."""
        pieces: list[TrainBatch] = []
        for _ in range(self.config.data.micro_batches):
            batch, position = next(batches)
            pieces.append(batch)
        valid = [max(sum(counts), 1) for counts in zip(*(b.valid for b in pieces), strict=True)]
        main: Any = 0.0
        mtp: Any = 0.0
        balance: Any = 0.0
        seen: list[Tensor] = []
        for piece in pieces:
            losses = compute_losses(
                self.model, piece.to(self.device), self.config.loss, valid, len(pieces), seen
            )
            losses.total.backward()
            self.optimizer.collect()
            main, mtp = main + losses.main, mtp + losses.mtp
            balance = balance + losses.balance
            pairs = zip(seen, losses.counts, strict=True) if seen else None
            seen = [a + b for a, b in pairs] if pairs is not None else losses.counts
        lr = learning_rate(self.step_done, self.progress(), self.config.optimizer)
        norm = self.optimizer.step(lr)
        self.step_done, self.position = self.step_done + 1, position
        return {"loss": main, "mtp_loss": mtp, "balance": balance, "grad_norm": norm, "lr": lr,
                "skipped": self.optimizer.skipped, "expert_load": seen}  # fmt: skip

    def _watch(self, row: dict[str, Any]) -> None:
        """Bad steps were skipped on the device: say so, or give up if nothing else is left."""
        new, self._skipped = row["skipped"] - self._skipped, row["skipped"]
        if new:
            log.warning("step=%d: %d updates skipped since the last line", row["step"], new)
        if new >= self.config.log_every and not math.isfinite(row["loss"]):
            raise TrainingError(
                f"the last {new:.0f} updates were skipped; the loss of step {row['step']} is "
                f"{row['loss']}",
                hint="lower optimizer.lr or raise warmup_steps, then go on from the checkpoint",
            )

    def evaluate(self) -> Evaluation:
        """Score the held-out split."""
        tokens = min(self.config.data.batch_tokens, 65536)
        return evaluate(self.model, self.heldout, self.config.data.seq_len, tokens)

    def checkpoint(self) -> None:
        """Write everything needed to go on."""
        facts = {
            "step": self.step_done,
            "elapsed_s": self.elapsed,
            "data": self.position,
            "fixed": self._fixed(),
        }
        save_checkpoint(self.output, self.optimizer.tensors(), facts)

    def _fixed(self) -> dict[str, Any]:
        """What must not change between a run and its continuation."""
        data = self.config.data
        return {
            **{f"model.{k}": v for k, v in self.config.model.items()},
            "data.seq_len": data.seq_len,
            "data.documents": [len(shards) for shards, _ in self.sources],
            "data.tokens": [len(shards.tokens) for shards, _ in self.sources],
            "data.weights": [weight for _, weight in self.sources],
            "seed": self.config.seed,
            "optimizer.kind": self.config.optimizer.kind,
        }

    def _resume(self) -> None:
        found = load_checkpoint(self.output)
        if found is None:
            return
        tensors, facts = found
        old, new = facts["fixed"], self._fixed()
        changed = sorted(k for k in old | new if old.get(k) != new.get(k))
        if changed:
            raise TrainingError(
                f"{self.output} holds a run with another {', '.join(changed)}",
                hint="choose another output folder, or remove this one",
            )
        self.optimizer.load_tensors(tensors)
        self._skipped = float(self.optimizer.skipped)
        self.step_done, self.elapsed = facts["step"], facts["elapsed_s"]
        self.position = facts["data"]
        self.loader.load_state_dict(self.position)
        log.info("resumed step=%d from %s", self.step_done, self.output)

    def export(self, result: Evaluation) -> Path:
        """Write the Hugging Face folder ``output/model`` in BF16, with the figures beside it."""
        folder = save_model(
            self.model,
            self.output / "model",
            dtype=torch.bfloat16,
            extra_files=self.config.data.tokenizer,
        )
        text = json.dumps({"steps": self.step_done, **result.to_dict()}, indent=2)
        (self.output / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        return folder


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Read the device values of a step: the only synchronisation, once per log line."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key == "expert_load":
            out[key] = [
                [round(x, 3) for x in (c.float() / c.float().mean()).tolist()] for c in value
            ]
        else:
            out[key] = float(value)
    return out
