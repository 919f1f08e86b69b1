"""The census: what a folder holds against what its config asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from qnext.checkpoint.reader import Entry, SafetensorsFolder
from qnext.config import ModelConfig
from qnext.errors import CheckpointError, MissingTensor, ShapeMismatch, UnexpectedTensor
from qnext.quant.config import Quantization, parse_quantization, read_quantization
from qnext.quant.format import PackedTensor
from qnext.quant.layout import pack_rules, quantised_names
from qnext.quant.surgery import PackedParameter
from qnext.weights import DiskTensor, disk_tensors

FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class Layout:
    """How a folder spells its names, and every tensor it should hold.

    Attributes:
        config: the model, with MTP if the files have it.
        prefix: of the backbone's names.
        fused_experts: whether experts are stacked on disk.
        tensors: by name; those of quantised modules are ``PackedTensor``.
        packed: parameter name -> how it is packed.
        quantization: what the config says; None for plain weights.
    """

    config: ModelConfig
    prefix: str
    fused_experts: bool
    tensors: dict[str, DiskTensor]
    packed: dict[str, PackedParameter] = field(default_factory=dict)
    quantization: Quantization | None = None

    def only(self, tensors: dict[str, DiskTensor]) -> Layout:
        """The same layout with some of its tensors."""
        return replace(self, tensors=tensors)


def detect_layout(
    config: ModelConfig,
    entries: Iterable[str] | Mapping[str, Entry],
    quantization: dict[str, Any] | None = None,
) -> Layout:
    """Choose prefix, expert storage, MTP and quantisation from the names that are there.

    Published configs of Qwen3-Next do not say whether ``mtp.*`` is included; the files do.

    Args:
        config: of the model.
        entries: what the files hold, or only names; empty if there are no files.
        quantization: the ``quantization_config``.

    Raises:
        ConfigError: a quantisation that is not known or contradicts itself.
        CheckpointError: a module is packed and should not be, or the other way round.
    """
    names = list(entries)
    prefix = "model."
    if any(n.startswith("model.language_model.") for n in names):
        prefix = "model.language_model."
    fused = any(n.endswith("experts.gate_up_proj") for n in names)
    if not config.num_mtp_layers and any(n.startswith("mtp.") for n in names):
        config = config.model_copy(update={"num_mtp_layers": 1})
    rules = disk_tensors(config, prefix=prefix, fused_experts=fused)
    if quantization is None:
        return Layout(config, prefix, fused, {t.name: t for t in rules})
    parsed = parse_quantization(quantization, names)
    dtypes: dict[str, str] | None = dict.fromkeys(names, "") if names else None
    if isinstance(entries, Mapping):
        dtypes = {name: entry.dtype for name, entry in entries.items()}
    table, packed = pack_rules(rules, parsed, dtypes)
    return Layout(config, prefix, fused, table, packed, parsed)


def read_layout(folder: SafetensorsFolder, config: ModelConfig | None = None) -> Layout:
    """The layout of a folder, checked: config, names, shapes and dtypes agree.

    Raises:
        ConfigError, CheckpointError: they do not.
    """
    config = config or ModelConfig.from_pretrained(folder.folder)
    layout = detect_layout(config, folder.entries, read_quantization(folder.folder))
    check_census(layout, folder)
    return layout


def check_census(layout: Layout, folder: SafetensorsFolder) -> None:
    """Hold the folder against the layout.

    Raises:
        CheckpointError: quantised weights that the config does not speak of.
        UnexpectedTensor, MissingTensor, ShapeMismatch: with the names listed.
    """
    entries = folder.entries
    scales = quantised_names(entries) if layout.quantization is None else []
    if scales:
        raise CheckpointError(
            f"{folder.folder} holds quantised weights ({scales[0]} and {len(scales) - 1} more), "
            "yet its config.json has no quantization_config",
            hint="the config.json of another checkpoint was copied here",
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
        f"{n}: {e.dtype} {list(e.shape)}, expected {_dtypes(t)} and {list(t.shape)}"
        for n, t in layout.tensors.items()
        if (e := entries.get(n)) is not None and not _fits(e, t)
    ]
    if wrong:
        raise ShapeMismatch(
            f"{folder.folder}: {len(wrong)} tensors do not fit the config:\n" + _lines(wrong)
        )


def _fits(entry: Entry, tensor: DiskTensor) -> bool:
    allowed = tensor.piece.dtypes if isinstance(tensor, PackedTensor) else FLOATS
    return entry.dtype in allowed and entry.shape == tensor.shape


def _dtypes(tensor: DiskTensor) -> str:
    return " or ".join(tensor.piece.dtypes) if isinstance(tensor, PackedTensor) else "a float dtype"


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
