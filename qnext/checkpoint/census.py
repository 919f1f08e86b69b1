"""The census: what a folder holds against what its config asks for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from qnext.checkpoint.reader import Entry, SafetensorsFolder
from qnext.config import ModelConfig
from qnext.errors import CheckpointError, MissingTensor, ShapeMismatch, UnexpectedTensor
from qnext.weights import DiskTensor, disk_tensors

FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class Layout:
    """How a folder spells its names, and every tensor it should hold."""

    config: ModelConfig
    prefix: str
    fused_experts: bool
    tensors: dict[str, DiskTensor]


def detect_layout(config: ModelConfig, names: Iterable[str]) -> Layout:
    """Choose prefix, expert storage and MTP from the names that are there.

    Published configs of Qwen3-Next do not say whether ``mtp.*`` is included; the files do.
    """
    names = list(names)
    prefix = "model."
    if any(n.startswith("model.language_model.") for n in names):
        prefix = "model.language_model."
    fused = any(n.endswith("experts.gate_up_proj") for n in names)
    if not config.num_mtp_layers and any(n.startswith("mtp.") for n in names):
        config = config.model_copy(update={"num_mtp_layers": 1})
    table = {t.name: t for t in disk_tensors(config, prefix=prefix, fused_experts=fused)}
    return Layout(config, prefix, fused, table)


def check_census(layout: Layout, folder: SafetensorsFolder) -> None:
    """Hold the folder against the layout.

    Raises:
        CheckpointError: quantised weights, which this loader does not read.
        UnexpectedTensor, MissingTensor, ShapeMismatch: with the names listed.
    """
    entries = folder.entries
    scales = [n for n in entries if n.endswith((".weight_scale_inv", ".weight_packed", ".qweight"))]
    if scales:
        raise CheckpointError(
            f"{folder.folder} holds quantised weights ({scales[0]} and {len(scales) - 1} more), "
            "which qnext does not load yet",
            hint="use the BF16 checkpoint",
        )
    # A multimodal checkpoint read for its text: the vision tower is left alone.
    vision = layout.prefix != "model."
    unexpected = [
        n for n in entries
        if n not in layout.tensors and not (vision and n.startswith("model.visual."))
    ]  # fmt: skip
    if unexpected:
        raise UnexpectedTensor(
            f"{folder.folder} holds {len(unexpected)} tensors that its config does not ask for:\n"
            + _lines(unexpected),
            hint="config.json and weights belong to different models, or a name is misspelt",
        )
    missing = [n for n, t in layout.tensors.items() if n not in entries and not t.optional]
    if missing:
        raise MissingTensor(
            f"{folder.folder} lacks {len(missing)} of {len(layout.tensors)} tensors:\n"
            + _lines(missing)
        )
    wrong = [
        f"{n}: {e.dtype} {list(e.shape)}, expected a float dtype and {list(t.shape)}"
        for n, t in layout.tensors.items()
        if (e := entries.get(n)) is not None and not _fits(e, t)
    ]
    if wrong:
        raise ShapeMismatch(
            f"{folder.folder}: {len(wrong)} tensors do not fit the config:\n" + _lines(wrong)
        )


def _fits(entry: Entry, tensor: DiskTensor) -> bool:
    return entry.dtype in FLOATS and entry.shape == tensor.shape


def _lines(names: list[str], count: int = 20) -> str:
    more = [f"... and {len(names) - count} more"] if len(names) > count else []
    return "\n".join(f"  {n}" for n in names[:count] + more)


def parameter_count(config: ModelConfig) -> tuple[int, int]:
    """(parameters of the main model, of the MTP module); arithmetic, nothing is built."""
    main = mtp = 0
    for tensor in disk_tensors(config, fused_experts=True):
        if tensor.optional:
            continue
        if tensor.name.startswith("mtp."):
            mtp += prod(tensor.shape)
        else:
            main += prod(tensor.shape)
    return main, mtp


def active_parameter_count(config: ModelConfig) -> int:
    """Parameters that one token uses: k routed experts of each sparse layer, and all the rest.

    The embedding table counts as a whole, as in "3B of 80B"; the MTP module does not count.
    """
    main, _ = parameter_count(config)
    idle = config.num_experts - config.num_experts_per_tok
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    return main - sum(config.sparse_layers) * idle * expert
