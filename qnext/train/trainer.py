"""One step, one loop."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from qnext.checkpoint import save_model
from qnext.checkpoint.load import parse_device, parse_dtype
from qnext.config import ModelConfig
from qnext.errors import ConfigError, TrainingError
from qnext.hub import resolve_model
from qnext.parallel.launch import join
from qnext.train.build import build_objective, gathered
from qnext.train.config import TrainConfig, dump_recipe
from qnext.train.data import PackedLoader, TokenShards, TrainBatch, prefetch
from qnext.train.evaluate import Evaluation, evaluate
from qnext.train.loss import Step
from qnext.train.optim import MasterOptimizer
from qnext.train.plots import plot, write_page
from qnext.train.report import PEAK, Report, flops_per_token
from qnext.train.resume import latest, read_checkpoint, save_checkpoint
from qnext.train.schedule import learning_rate
from qnext.train.sharded import ShardedSaver, load_sharded
from qnext.train.watch import Watch

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
    """Trains one model as its recipe says, on one device or many, and goes on where it stopped.

    Raises:
        ConfigError: a recipe that does not fit together, or not the ranks.
        TrainingError: data that do not fit the model.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        device = parse_device(config.device)
        self.mesh = join(config.parallel, device)
        self.device = self.mesh.device if self.mesh is not None else device
        self.main = self.mesh is None or self.mesh.world.get_rank() == 0
        if not self.main:
            log.setLevel(logging.WARNING)
        self.model_config = self._model_config()
        self.part, self.parts = self._share()
        self.depth = config.loss.mtp_depth if self.model_config.num_mtp_layers else 0
        parts = config.data.mixture
        self.sources = [(TokenShards(part.shards, "train"), part.weight) for part in parts]
        self.heldout = [TokenShards(part.shards, "heldout") for part in parts]
        self._check_data()
        dtype = parse_dtype(config.dtype)
        if dtype is None:
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.objective = build_objective(config, self.model_config, self.mesh, self.device, dtype)
        self.model = self.objective.model
        self.optimizer = MasterOptimizer(self.model, config.optimizer, dtype)
        self.loader = PackedLoader(
            self.sources,
            config.data.batch_tokens // config.data.micro_batches,
            config.data.seq_len,
            self.depth,
            config.seed,
            self.part,
            self.parts,
        )
        self.saver = ShardedSaver(self.output) if self.mesh is not None else None
        self.watch = Watch(config.stability, config.log_every)
        self.step_done = 0
        self.elapsed = 0.0
        self.position = self.loader.state_dict()

    def _model_config(self) -> ModelConfig:
        if self.config.init_from is None:
            return ModelConfig.from_dict(self.config.model)
        return ModelConfig.from_pretrained(resolve_model(self.config.init_from))

    def _share(self) -> tuple[int, int]:
        """This rank's number among the data-parallel ones, and how many those are."""
        data, mesh = self.config.data, self.mesh
        if data.batch_tokens % data.micro_batches:
            raise ConfigError(
                f"data.batch_tokens {data.batch_tokens} does not divide into "
                f"{data.micro_batches} micro batches"
            )
        if mesh is None:
            return 0, 1
        part, parts = mesh.place("data")
        if data.micro_batches % parts:
            raise ConfigError(
                f"data.micro_batches {data.micro_batches} does not divide over {parts} "
                "data-parallel ranks",
                hint="each of them computes whole micro batches: choose a multiple",
            )
        pieces = mesh.place("context")[1]
        if data.batch_tokens // data.micro_batches < pieces:
            raise ConfigError(f"a micro batch has fewer tokens than the {pieces} context ranks")
        return part, parts

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
        peak = None
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            peak = next((v for k, v in PEAK.items() if k in name), None)
            torch.set_float32_matmul_precision("high")
            if peak is not None and self.mesh is not None:
                peak *= self.mesh.world.size()
        flops = flops_per_token(self.model_config, config.data.seq_len, self.depth)
        report: Report | None = None
        if self.main:
            (self.output / "run.toml").write_text(dump_recipe(config), encoding="utf-8")
            report = Report(
                self.output, config.steps, self.step_done, flops, peak, self.progress(),
                config.report,
            )  # fmt: skip
        try:
            self._loop(report)
            self.checkpoint()
            if self.saver is not None:
                self.saver.wait()
            result = self.evaluate()
            if report is not None:
                report.write({"step": self.step_done, "heldout": result.to_dict()})
        finally:
            if report is not None:
                report.close()
        log.info("heldout %s", json.dumps(result.to_dict()))
        if self.main and config.report.plots:
            write_page(self.output, plot(self.output))
        skipped = int(self.optimizer.skipped)
        return TrainResult(
            self.export(result), self.step_done, self.progress() >= 1, skipped, result
        )

    def _loop(self, report: Report | None) -> None:
        """Steps until the run is done or this call has had its time."""
        config = self.config
        batches = prefetch(self.loader, pin=self.device.type == "cuda")
        started, before = time.perf_counter(), self.elapsed
        late = False
        try:
            while self.progress() < 1 and not late:
                values = self._step(batches)
                step = self.step_done
                spent = self._agreed(time.perf_counter() - started)
                self.elapsed = before + spent
                late = bool(config.stop_after_s) and spent > config.stop_after_s
                told = step % config.log_every == 0 or self.progress() >= 1
                saves = bool(config.checkpoint_every) and step % config.checkpoint_every == 0
                if told or saves:
                    numbers = self._numbers(values)
                    if told and report is not None:
                        report.step(step, config.data.batch_tokens, numbers, self.progress())
                    if self._healthy(numbers, report) and saves:
                        self.checkpoint()
                if self.saver is not None:
                    self.saver.poll()
                evaluates = config.eval_every and step % config.eval_every == 0
                if evaluates and step < config.steps:
                    found = self.evaluate()
                    if report is not None:
                        report.write({"step": step, "heldout": found.to_dict()})
        finally:
            batches.close()
        if late:
            log.info("stopped step=%d after %.0f s", self.step_done, config.stop_after_s)

    def _agreed(self, seconds: float) -> float:
        """The first rank's clock, where clocks decide anything."""
        limits = self.config.time_limit_s or self.config.stop_after_s
        if self.mesh is None or not limits:
            return seconds
        shared = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def progress(self) -> float:
        """Share of the run that is done: by steps, or by the clock if that is further."""
        limit = self.config.time_limit_s
        return max(self.step_done / self.config.steps, self.elapsed / limit if limit else 0.0)

    def _step(self, batches: Iterator[tuple[TrainBatch, dict[str, Any]]]) -> dict[str, Any]:
        """One optimizer step; every value stays on the device."""
        data = self.config.data
        pieces: list[TrainBatch] = []
        for _ in range(data.micro_batches // self.parts):
            batch, position = next(batches)
            pieces.append(batch)
        valid = [max(sum(counts), 1) for counts in zip(*(b.valid for b in pieces), strict=True)]
        whole = Step(tuple(valid), data.batch_tokens)
        context = self.mesh.place("context") if self.mesh is not None else (0, 1)
        sums = torch.zeros(3, device=self.device)
        seen: Tensor | None = None
        for piece in pieces:
            batch = piece.to(self.device).cut(*context)
            total, main, mtp, balance, counts = self.objective(batch, whole, seen)
            total.backward()
            self.optimizer.collect()
            sums += torch.stack([main, mtp, balance]).to(sums.dtype)
            seen = counts if seen is None else seen + counts
        lr = learning_rate(self.step_done, self.progress(), self.config.optimizer)
        norm = self.optimizer.step(lr)
        self.step_done, self.position = self.step_done + 1, position
        return {"sums": sums, "grad_norm": norm, "lr": lr, "skipped": self.optimizer.skipped,
                "expert_load": seen}  # fmt: skip

    def _numbers(self, values: dict[str, Any]) -> dict[str, Any]:
        """Read the device values of a step: the only synchronisation, and only when needed."""
        sums = values.pop("sums")
        if self.mesh is not None:
            dist.all_reduce(sums)
        loss, mtp, balance = sums.tolist()
        load = values.pop("expert_load")
        out = {"loss": loss, "mtp_loss": mtp, "balance": balance}
        out |= {key: float(value) for key, value in values.items()}
        out["expert_load"] = expert_load(load)
        if out["expert_load"]:
            flat = [x for layer in out["expert_load"] for x in layer]
            out["load_max"], out["load_min"] = max(flat), min(flat)
        return out

    def _healthy(self, numbers: dict[str, Any], report: Report | None) -> bool:
        """Whether a checkpoint may be written now; rolls back a run that cannot go on from here."""
        fine, bad, new = self.watch.judge(numbers["loss"], numbers["skipped"])
        if new:
            log.warning("step=%d: %d updates skipped since the last line", self.step_done, new)
        if bad is None:
            return fine
        why = f"step {self.step_done}: {bad}"
        if (
            latest(self.output) is None
            or self.watch.rollbacks >= self.config.stability.max_rollbacks
        ):
            raise TrainingError(
                f"{why}; {self.watch.rollbacks} rollbacks were made",
                hint="lower optimizer.lr or raise warmup_steps, then go on from the checkpoint",
            )
        # The data go on: what led here is not seen again.
        self.watch.rollbacks += 1
        if self.saver is not None:
            self.saver.wait()
        position, elapsed, reached = self.position, self.elapsed, self.step_done
        self._load()
        self.position, self.elapsed = position, elapsed
        log.warning("%s; back to step %d, on with other data", why, self.step_done)
        if report is not None:
            report.event("rollback", self.step_done, {"from": reached, "why": bad})
        return False

    def evaluate(self) -> Evaluation:
        """Score the held-out split."""
        tokens = min(self.config.data.batch_tokens, 65536)
        return evaluate(self.objective, self.heldout, self.config.data.seq_len, tokens, self.mesh)

    def checkpoint(self) -> None:
        """Write everything needed to go on; with many ranks, begin to."""
        facts = {
            "step": self.step_done,
            "elapsed_s": self.elapsed,
            "data": self.position,
            "watch": self.watch.state_dict(),
            "fixed": self._fixed(),
        }
        if self.saver is not None:
            self.optimizer.prepare()
            self.saver.save(self.optimizer.tensors(), facts)
        else:
            save_checkpoint(self.output, self.optimizer.tensors(), facts)

    def _fixed(self) -> dict[str, Any]:
        """What must not change between a run and its continuation."""
        data = self.config.data
        return {
            **{f"model.{k}": v for k, v in self.config.model.items()},
            "init_from": self.config.init_from,
            "data.seq_len": data.seq_len,
            "data.documents": [len(shards) for shards, _ in self.sources],
            "data.tokens": [len(shards.tokens) for shards, _ in self.sources],
            "data.weights": [weight for _, weight in self.sources],
            "seed": self.config.seed,
            "optimizer.kind": self.config.optimizer.kind,
        }

    def _resume(self) -> None:
        if self._load():
            self.loader.load_state_dict(self.position)
            log.info("resumed step=%d from %s", self.step_done, self.output)

    def _load(self) -> bool:
        """Take over the last checkpoint, of one process or of any number of ranks."""
        found = latest(self.output)
        if found is None:
            return False
        tensors, facts = read_checkpoint(found)
        old, new = facts["fixed"], self._fixed()
        changed = sorted(k for k in old | new if old.get(k) != new.get(k))
        if changed:
            raise TrainingError(
                f"{self.output} holds a run with another {', '.join(changed)}",
                hint="choose another output folder, or remove this one",
            )
        if tensors is None:
            self.optimizer.prepare()
            tensors = self.optimizer.tensors()
            load_sharded(found, tensors)
        self.optimizer.load_tensors(tensors)
        self.watch.load_state_dict(facts["watch"], float(self.optimizer.skipped))
        self.step_done, self.elapsed = facts["step"], facts["elapsed_s"]
        self.position = facts["data"]
        return True

    def export(self, result: Evaluation) -> Path:
        """Write the Hugging Face folder ``output/model`` in BF16, with the figures beside it."""
        folder = self.output / "model"
        model = self.model if self.mesh is None else gathered(self.model, self.main)
        if self.main:
            assert model is not None
            save_model(model, folder, dtype=torch.bfloat16, extra_files=self.config.data.tokenizer)
            text = json.dumps({"steps": self.step_done, **result.to_dict()}, indent=2)
            (self.output / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        if self.mesh is not None:
            dist.barrier()
        return folder


def expert_load(counts: Tensor | None) -> list[list[float]]:
    """Per sparse layer the load of every expert, 1 where it is balanced."""
    if counts is None:
        return []
    return [[round(x, 3) for x in (c.float() / c.float().mean()).tolist()] for c in counts]
