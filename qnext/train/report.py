"""What a run tells while it runs: metrics as JSON lines, a bar or lines, and sinks of others."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qnext.config import ModelConfig
from qnext.train.bar import Bar
from qnext.train.config import ReportConfig
from qnext.train.sinks import open_sinks
from qnext.weights import disk_tensors

log = logging.getLogger(__name__)
# Dense BF16 rate by device name, FLOP/s, for the model FLOP utilisation.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def flops_per_token(config: ModelConfig, seq_len: int, mtp_depth: int) -> float:
    """Training FLOPs of one token: 6 per active matrix element, plus attention and delta rule.

    Attention counts the causal half; MTP layers count once per depth; recomputation never.
    """
    idle = 1.0
    if config.num_experts:
        idle = config.num_experts_per_tok / config.num_experts
    main = mtp = 0.0
    for tensor in disk_tensors(config, fused_experts=True):
        name = tensor.name
        if len(tensor.shape) < 2 or tensor.optional or name.endswith("embed_tokens.weight"):
            continue
        used = tensor.numel * (idle if ".mlp.experts." in name else 1.0)
        if name.startswith("mtp."):
            mtp += used
        else:
            main += used
    head = config.vocab_size * config.hidden_size
    if config.tie_word_embeddings:
        main += head
    full = sum(kind == "full_attention" for kind in config.layer_types)
    delta = config.num_hidden_layers - full
    attention = full * 6 * seq_len * config.num_attention_heads * config.head_dim
    state = config.linear_key_head_dim * config.linear_value_head_dim
    rule = delta * 3 * 6 * config.linear_num_value_heads * state
    return 6 * (main + mtp_depth * (mtp + head)) + attention + rule


class Report:
    """Writes ``metrics.jsonl`` and a line of progress; on a terminal, a bar."""

    def __init__(
        self,
        folder: Path,
        steps: int,
        start: int,
        flops: float,
        peak: float | None,
        progress: float = 0.0,
        config: ReportConfig | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _forget_after(folder / "metrics.jsonl", start)
        self.folder, self.steps, self.flops, self.peak = folder, steps, flops, peak
        self.sinks = open_sinks(folder, config or ReportConfig(tensorboard=False))
        self.file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.started = self.last = time.perf_counter()
        self.last_step, self.last_progress = start, progress
        self.bar = Bar.on_terminal(steps, start)

    def step(
        self, step: int, tokens: int, values: dict[str, Any], progress: float
    ) -> dict[str, Any]:
        """Record the values of ``step`` (1-based); rates are over the steps since the last.

        Args:
            step: optimizer steps done.
            tokens: of one step.
            values: plain numbers to write.
            progress: share of the run that is done, for the time left.
        """
        now = time.perf_counter()
        done = max(step - self.last_step, 1)
        rate = done * tokens / max(now - self.last, 1e-9)
        row = {"step": step, "tokens": step * tokens, **values, "tokens_per_s": rate}
        if self.peak:
            row["mfu"] = rate * self.flops / self.peak
        row["memory_gib"] = peak_memory() / 2**30
        speed = (progress - self.last_progress) / max(now - self.last, 1e-9)
        row["eta_s"] = (1 - progress) / speed if speed > 0 else 0.0
        self.last_progress = progress
        self.last, self.last_step = now, step
        self.write(row)
        if self.bar is not None:
            self.bar.update(row)
        else:
            text = " ".join(f"{k}={v:.4g}" for k, v in _numbers(row))
            log.info("step=%d/%d %s", step, self.steps, text)
        return row

    def write(self, row: dict[str, Any]) -> None:
        """Append one JSON line, and pass its numbers on."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.sinks:
            numbers = dict(_numbers(row))
            for sink in self.sinks:
                sink.log(numbers, row["step"])

    def event(self, name: str, step: int, facts: dict[str, Any]) -> None:
        """Record that something happened to the run."""
        self.last, self.last_step = time.perf_counter(), step
        self.last_progress = min(self.last_progress, step / self.steps)
        self.write({"step": step, "event": name, **facts})

    def close(self) -> None:
        """End the bar and the file."""
        if self.bar is not None:
            self.bar.close()
        for sink in self.sinks:
            sink.close()
        self.file.close()


def peak_memory() -> int:
    """Most bytes held so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Kilobytes, but bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _numbers(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Names and values of all plain numbers of a row."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in ("step", "tokens"):
            yield prefix + key, float(value)


def _forget_after(file: Path, step: int) -> None:
    """Drop lines that a killed run wrote after its last checkpoint: they will come again."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that the kill cut off
        if row["step"] <= step:
            kept.append(line + "\n")
    file.write_text("".join(kept), encoding="utf-8")
