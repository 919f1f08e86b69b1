"""Loading: config -> empty model -> census -> stream every tensor into its place."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qnext.checkpoint.census import FLOATS, Layout, read_layout
from qnext.checkpoint.fill import fill
from qnext.checkpoint.progress import transfer_bar
from qnext.checkpoint.reader import SafetensorsFolder
from qnext.config import ModelConfig
from qnext.errors import ConfigError
from qnext.layers.model import CausalLM
from qnext.quant.format import PackedTensor
from qnext.quant.matrix import PackedMatrix
from qnext.quant.surgery import PackedParameter, apply

log = logging.getLogger(__name__)
DTYPES = {name: getattr(torch, name) for name in FLOATS.values()}


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from its name; None for "auto".

    Raises:
        ConfigError: not a float dtype.
    """
    if dtype is None or dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype):
        name = str(dtype).removeprefix("torch.")
    else:
        name = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32",
                "float": "float32"}.get(dtype, dtype)  # fmt: skip
    if name not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known", hint="known: auto, " + ", ".join(DTYPES))
    return DTYPES[name]


def parse_device(device: str | torch.device | None) -> torch.device:
    """A usable device; "auto" takes CUDA where there is one.

    Raises:
        ConfigError: no such device on this machine.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is not known: {error}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for and torch sees no CUDA device",
                          hint="use device='cpu', or see `qnext doctor`")  # fmt: skip
    return found


def load_model(
    path: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    progress: Callable[[int, int], None] | bool = False,
    revision: str | None = None,
    offline: bool = False,
) -> CausalLM:
    """Load a checkpoint as one ``nn.Module``.

    Args:
        path: folder, or model id of a hub; None for the shipped model.
        dtype: of the parameters; "auto" keeps what is on disk.
        device: "auto" takes CUDA where there is one.
        progress: called with (bytes done, bytes in all) as they arrive, from several threads but
            one at a time; True shows a bar on a terminal.
        revision: pins a hub revision.
        offline: use only what is already downloaded.

    Returns:
        The model in evaluation mode; ``model(input_ids).logits``.

    Raises:
        ConfigError, CheckpointError, HubError: before any weight is allocated, except for
            damage that only shows while reading.
    """
    from qnext.hub import resolve_model

    folder = resolve_model(path, revision=revision, offline=offline)
    target, place = parse_dtype(dtype), parse_device(device)
    config = ModelConfig.from_pretrained(folder)
    files = SafetensorsFolder(folder)
    layout = read_layout(files, config)
    model = empty_model(layout.config, *choose_dtypes(layout, files, target), place, layout.packed)
    started = time.perf_counter()
    if progress is True:
        with transfer_bar(f"loading {folder.name}") as bar:
            fill(model, layout, files, bar)
    else:
        fill(model, layout, files, progress or None)
    log.info(
        "loaded model=%s bytes=%d seconds=%.2f", folder.name, files.nbytes,
        time.perf_counter() - started,
    )  # fmt: skip
    return model.eval()


def choose_dtypes(
    layout: Layout, files: SafetensorsFolder, target: torch.dtype | None
) -> tuple[torch.dtype, dict[str, torch.dtype]]:
    """Dtype of the matrices, and of those vectors that differ on disk (such as A_log)."""
    if target is not None:
        return target, {}
    embed = files.entries[layout.prefix + "embed_tokens.weight"]
    main = DTYPES[FLOATS[embed.dtype]]
    other = {}
    for name, tensor in layout.tensors.items():
        entry = files.entries.get(name)
        if isinstance(tensor, PackedTensor) or entry is None:
            continue
        if entry.dtype != embed.dtype and len(tensor.shape) == 1:
            other[tensor.parts[0].param] = DTYPES[FLOATS[entry.dtype]]
    return main, other


class _NoInit(TorchFunctionMode):
    """Builds modules without their random start, which alone costs a second on the meta device."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func is torch.arange:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def empty_model(
    config: ModelConfig,
    dtype: torch.dtype,
    other: dict[str, torch.dtype],
    device: torch.device,
    packed: Mapping[str, PackedParameter] | None = None,
) -> CausalLM:
    """A model with allocated, uninitialised parameters on ``device``.

    Args:
        config: what to build.
        dtype: of the parameters.
        other: parameter name -> dtype, where it differs.
        device: where.
        packed: parameters that are quantised, and how; they keep the dtypes of their format.
    """
    model = skeleton(config, packed)
    allocate(model, dtype, other, device)
    restore_buffers(model, device)
    return model


def skeleton(config: ModelConfig, packed: Mapping[str, PackedParameter] | None = None) -> CausalLM:
    """A model on the meta device, its quantised modules exchanged: no memory at all."""
    with torch.device("meta"), _NoInit():
        model = CausalLM(config)
    apply(model, packed or {})
    return model


def allocate(
    model: CausalLM,
    dtype: torch.dtype,
    other: Mapping[str, torch.dtype],
    device: torch.device,
    within: tuple[str, ...] = ("",),
) -> None:
    """Give parameters memory, uninitialised; on the meta device take it away.

    Args:
        model: whose parameters.
        dtype: of the plain ones.
        other: parameter name -> dtype, where it differs.
        device: where.
        within: only parameters whose names start so.
    """
    for name, old in list(model.named_parameters()):
        if not name.startswith(within):
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        kind = old.dtype if isinstance(owner, PackedMatrix) else other.get(name, dtype)
        fresh = nn.Parameter(torch.empty(old.shape, dtype=kind, device=device), old.requires_grad)
        setattr(owner, name.rpartition(".")[2], fresh)


def restore_buffers(model: CausalLM, device: torch.device) -> None:
    """Compute again what is not in checkpoints: the rotary frequencies, always fp32."""
    from qnext.layers.rotary import RotaryEmbedding

    model.rotary = RotaryEmbedding(model.config).to(device)
