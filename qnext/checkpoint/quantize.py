"""Quantise a plain folder into another one, layer by layer.

The calibration text runs through each layer while its weights are in memory anyway, so that the
scales of INT4 groups can be chosen by what they change in the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qnext.checkpoint.save import copy_extra_files, gather, write_json
from qnext.checkpoint.stream import PartialModel
from qnext.checkpoint.writer import ShardWriter
from qnext.errors import ConfigError
from qnext.layers.moe import Experts
from qnext.layers.packed import PackedBatch
from qnext.quant.plan import QuantizePlan
from qnext.weights import DiskTensor, Part, disk_tensors

Advance = Callable[[int, int], None]


@dataclass
class Importance:
    """Mean squares of what each matrix multiplies, gathered while a layer runs.

    Attributes:
        linear: parameter name -> (K,).
        experts: parameter name -> (E, K); experts that saw few tokens share the layer's mean.
    """

    linear: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[str, Tensor] = field(default_factory=dict)

    FEW = 16

    def of(self, part: Part) -> Tensor | None:
        """For the matrix that a part of a disk tensor belongs to."""
        if part.index is not None and part.param in self.experts:
            return self.experts[part.param][part.index]
        return self.linear.get(part.param)

    def watch(self, model: nn.Module, stack: ExitStack) -> None:
        """Note inputs of every linear module and expert stack until the stack closes."""
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                hook = module.register_forward_pre_hook(self._linear_hook(name))
            elif isinstance(module, Experts):
                hook = module.register_forward_pre_hook(self._experts_hook(name))
            else:
                continue
            stack.callback(hook.remove)

    def _linear_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            del module
            self.linear[f"{name}.weight"] = _mean_square(inputs[0])

        return note

    def _experts_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(module, Experts)
            x, ids, _ = inputs
            count = len(module.gate_up_proj)
            into, between = [], []
            for expert in range(count):
                rows = x[(ids == expert).any(1)]
                gate, up = F.linear(rows, module.gate_up_proj[expert]).chunk(2, -1)
                into.append(rows)
                between.append(F.silu(gate) * up)
            for leaf, parts in (("gate_up_proj", into), ("down_proj", between)):
                usual = _mean_square(torch.cat(parts))
                self.experts[f"{name}.{leaf}"] = torch.stack(
                    [_mean_square(p) if len(p) >= self.FEW else usual for p in parts]
                )

        return note


def _mean_square(x: Tensor) -> Tensor:
    return x.float().square().flatten(0, -2).mean(0)


def quantize(
    source: Path,
    target: Path,
    *,
    format: str,
    group_size: int = 128,
    ignore: tuple[str, ...] = (),
    documents: list[Tensor] | None = None,
    device: torch.device | None = None,
    max_shard_size: int = 5_000_000_000,
    advance: Advance | None = None,
) -> QuantizePlan:
    """Write a quantised copy of a checkpoint.

    Args:
        source: a plain folder.
        target: folder to write.
        format: ``fp8``, as the official FP8 checkpoints, or ``int4``, compressed-tensors.
        group_size: columns per INT4 scale, 32 or 128.
        ignore: further modules to keep plain, by name.
        documents: token ids of the calibration text, one tensor per document; None rounds
            every group on the scale of its largest entry.
        device: that computes; the host keeps little more than a layer.
        max_shard_size: bytes per file.
        advance: called with (parts done, parts in all).

    Returns:
        What was made of each module.

    Raises:
        ConfigError: the source is quantised already, or an option is out of range.
        CheckpointError: the source cannot be read or the target cannot be written.
    """
    device = device or torch.device("cpu")
    partial = PartialModel(source, device, torch.float32 if device.type == "cpu" else None)
    layout = partial.layout
    if layout.quantization is not None:
        raise ConfigError(
            f"{source} is quantised already ({layout.quantization.label})",
            hint="quantise the BF16 checkpoint, or `qnext convert` this one first",
        )
    rules = list(disk_tensors(layout.config))
    plan = QuantizePlan.make(rules, format, group_size, ignore)
    writer = ShardWriter(target, max_shard_size)
    try:
        _Walk(partial, plan, rules, writer, documents, advance).run()
    except BaseException:
        writer.abandon()
        raise
    writer.finish()
    config = layout.config.to_hf_dict() | {"quantization_config": plan.config()}
    config["torch_dtype"] = str(_disk_dtype(partial)).removeprefix("torch.")
    write_json(target / "config.json", config)
    copy_extra_files(source, target)
    return plan


def _disk_dtype(partial: PartialModel) -> torch.dtype:
    """Of plain tensors in the target: that of the source if it has 16 bits, else BF16."""
    kind = partial.files.entries[partial.layout.prefix + "embed_tokens.weight"].dtype
    return torch.float16 if kind == "F16" else torch.bfloat16


class _Walk:
    """One pass over the parts of a model: load, run, quantise, write, drop."""

    def __init__(
        self,
        partial: PartialModel,
        plan: QuantizePlan,
        rules: list[DiskTensor],
        writer: ShardWriter,
        documents: list[Tensor] | None,
        advance: Advance | None,
    ) -> None:
        self._partial, self._plan, self._writer = partial, plan, writer
        self._rules, self._documents = rules, documents
        self._dtype = _disk_dtype(partial)
        self._advance, self._done = advance, 0
        config = partial.layout.config
        self._total = config.num_hidden_layers + 3

    @torch.no_grad()
    def run(self) -> None:
        model, mtp = self._partial.model, self._partial.layout.config.num_mtp_layers
        self._partial.load("model.embed_tokens.")
        documents = self._documents
        h = ids = batch = rotary = None
        if documents is not None:
            ids = torch.cat(documents).to(model.device)
            batch = PackedBatch.of([len(d) for d in documents], device=ids.device)
            h = model.model.embed_tokens(ids)
            rotary = model.rotary(batch.positions, h.dtype)
        self._write("model.embed_tokens.", Importance())
        for i, layer in enumerate(model.model.layers):
            name = f"model.layers.{i}."
            self._partial.load(name)
            seen = Importance()
            if h is not None and batch is not None and rotary is not None:
                with ExitStack() as stack:
                    seen.watch(model, stack)
                    h = layer(h, batch, rotary, None, None)
            self._write(name, seen)
            self._partial.drop(name)
        self._partial.load("model.norm.", "lm_head.")
        hidden = None if h is None else model.model.norm(h)
        self._write("model.norm.", Importance())
        self._write("lm_head.", Importance())
        self._partial.drop("lm_head.")
        if mtp:
            self._partial.load("mtp.")
            seen = Importance()
            if hidden is not None and batch is not None and ids is not None:
                with ExitStack() as stack:
                    seen.watch(model, stack)
                    model.draft_states(hidden, ids.roll(-1), batch)
            self._write("mtp.", seen)
            self._partial.drop("mtp.")

    def _write(self, within: str, seen: Importance) -> None:
        params = dict(self._partial.model.named_parameters())
        for rule in self._rules:
            if rule.optional or not rule.parts[0].param.startswith(within):
                continue
            self._write_tensor(rule, params, seen)
        self._done += 1
        if self._advance is not None:
            self._advance(self._done, self._total)

    def _write_tensor(
        self, rule: DiskTensor, params: Mapping[str, Tensor], seen: Importance
    ) -> None:
        stem = rule.name.removesuffix(".weight")
        scheme = self._plan.schemes.get(stem)
        tensor = gather(rule, params, self._dtype)
        if scheme is None:
            self._writer.add(rule.name, tensor)
            return
        importance = seen.of(rule.parts[0])
        if importance is not None:
            importance = importance.cpu()
        for suffix, piece in scheme.encode(tensor, importance=importance).items():
            self._writer.add(stem + suffix, piece)
