"""Saving: the same rules backwards, one shard in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qnext.checkpoint.reader import INDEX, SINGLE
from qnext.config import ModelConfig
from qnext.errors import CheckpointError
from qnext.layers.model import CausalLM
from qnext.quant.surgery import matrices
from qnext.weights import DiskTensor, disk_tensors

SHARD_BYTES = 5_000_000_000


def save_model(
    model: CausalLM,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = SHARD_BYTES,
    fused_experts: bool | None = None,
    extra_files: str | Path | None = None,
) -> Path:
    """Write a Hugging Face folder that transformers and qnext load.

    Args:
        model: what to write; ``mtp.*`` is kept, and packed weights are dequantised.
        folder: created if needed; files of the same names are replaced.
        dtype: cast to it; default each parameter's own.
        max_shard_size: bytes per file; one file if everything fits.
        fused_experts: stacked expert tensors; default as the family publishes them
            (fused for Qwen3.5, per expert otherwise).
        extra_files: folder whose tokenizer, template and licence files are copied along.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    if fused_experts is None:
        fused_experts = config.model_type == "qwen3_5_moe"
    rules = [t for t in disk_tensors(config, fused_experts=fused_experts) if not t.optional]
    params = PlainParameters(model, dtype or model.dtype)

    def bytes_of(tensor: DiskTensor) -> int:
        kind = dtype or params.dtype_of(tensor.parts[0].param)
        return tensor.numel * kind.itemsize

    shards = list(_split(rules, bytes_of, max_shard_size))
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        tensors = {t.name: gather(t, params, dtype) for t in shard}
        replace(folder / name, partial(_write_shard, tensors))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(bytes_of, rules))},
            "weight_map": {t.name: n for n, s in zip(names, shards, strict=True) for t in s},
        }
        write_json(folder / INDEX, index)
    drop_stale(folder, {*names, *([INDEX] if len(shards) > 1 else [])})
    save_config(config, folder, dtype or model.dtype)
    if extra_files is not None:
        copy_extra_files(Path(extra_files), folder)
    return folder


class PlainParameters(Mapping[str, Tensor]):
    """The parameters of a model by name, the packed ones dequantised when they are asked for.

    Only the last few are kept: disk tensors of one layer's experts come in turns.
    """

    KEPT = 2

    def __init__(self, model: CausalLM, dtype: torch.dtype) -> None:
        self._packed, self._dtype = matrices(model), dtype
        inside = tuple(f"{name}." for name in self._packed)
        self._plain = {n: p for n, p in model.named_parameters() if not n.startswith(inside)}
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._packed:
            return self._plain[name]
        if name not in self._kept:
            while len(self._kept) >= self.KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = self._packed[name].dequantise(self._dtype)
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self._packed

    def __len__(self) -> int:
        return len(self._plain) + len(self._packed)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype a parameter has, or gets when it is dequantised."""
        return self._dtype if name in self._packed else self._plain[name].dtype


def _write_shard(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, {"format": "pt"})


def gather(tensor: DiskTensor, params: Mapping[str, Tensor], dtype: torch.dtype | None) -> Tensor:
    """Build one disk tensor on the host from the parameters it is made of."""
    out = torch.empty(tensor.shape, dtype=dtype or params[tensor.parts[0].param].dtype)
    with torch.no_grad():
        for part in tensor.parts:
            part.take(out).copy_(part.put(params[part.param]))
    return out


def save_config(config: ModelConfig, folder: Path, dtype: torch.dtype) -> None:
    """Write ``config.json``; ``torch_dtype`` is what 4.57 reads and 5.x accepts."""
    data = config.to_hf_dict()
    data["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", data)


def write_json(path: Path, data: object) -> None:
    """Write JSON to the side and rename, so that a reader never sees half a file."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    replace(path, lambda p: p.write_text(text, encoding="utf-8"))


def copy_extra_files(source: Path, target: Path) -> None:
    """Copy tokenizer, template, generation settings, card and licence."""
    if source.resolve() == target.resolve():
        return
    for file in sorted(source.iterdir()):
        text = file.suffix in (".json", ".jinja", ".txt", ".md") or file.name.startswith("LICEN")
        if file.is_file() and text and file.name not in ("config.json", INDEX):
            shutil.copyfile(file, target / file.name)


def _split(
    rules: list[DiskTensor], bytes_of: Callable[[DiskTensor], int], limit: int
) -> Iterator[list[DiskTensor]]:
    shard: list[DiskTensor] = []
    size = 0
    for tensor in rules:
        if shard and size + bytes_of(tensor) > limit:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += bytes_of(tensor)
    yield shard


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file to the side, then put it in place.

    Raises:
        CheckpointError: it cannot be written.
    """
    side = path.with_name(path.name + ".part")
    try:
        write(side)
        os.replace(side, path)
    except OSError as error:
        side.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path}: {error.strerror or error}") from error


def drop_stale(folder: Path, kept: set[str]) -> None:
    """Remove weight files of an earlier save, which would contradict the new ones."""
    for file in [*folder.glob("model*.safetensors"), folder / INDEX]:
        if file.name not in kept:
            file.unlink(missing_ok=True)
