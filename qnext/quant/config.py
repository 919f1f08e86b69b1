"""``quantization_config`` of a config.json: which module is stored how."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qnext.errors import ConfigError
from qnext.quant.awq import AwqScheme
from qnext.quant.format import Scheme
from qnext.quant.fp8 import Fp8Scheme
from qnext.quant.gptq import GptqScheme
from qnext.quant.int4 import Int4Scheme
from qnext.quant.names import NameList

# Modules that the usual classes do not count as Linear, or never convert: they may be plain
# without being named.
FREE = ("lm_head", "gate", "shared_expert_gate", "fc")


@dataclass(frozen=True)
class Quantization:
    """What a checkpoint says about the storage of its modules.

    Attributes:
        method: quant_method.
        targets: in order of precedence: modules of these names have this scheme; None in place
            of names stands for every module, None in place of a scheme for plain storage.
        ignore: modules that stay plain.
        by_files: the config does not say which modules are plain; the files do.
    """

    method: str
    targets: tuple[tuple[NameList | None, Scheme | None], ...]
    ignore: NameList = field(default_factory=lambda: NameList((), "ignore"))
    by_files: bool = False

    def scheme(self, stem: str) -> Scheme | None:
        """The scheme that a module should have; None for plain."""
        if stem in self.ignore:
            return None
        for names, scheme in self.targets:
            if names is None or stem in names:
                return scheme
        return None

    def may_be_plain(self, stem: str) -> bool:
        """Whether a module with a scheme may be plain all the same."""
        return self.by_files or stem.rpartition(".")[2] in FREE

    @property
    def label(self) -> str:
        """For people: ``fp8 128x128 blocks``."""
        words = dict.fromkeys(s.label for _, s in self.targets if s is not None)
        return f"{self.method}: " + "; ".join(words)


def read_quantization(folder: str | Path) -> dict[str, Any] | None:
    """The ``quantization_config`` of a folder, or None; the config was read before.

    Raises:
        ConfigError: it is not an object.
    """
    data = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return find_quantization(data)


def find_quantization(data: dict[str, Any]) -> dict[str, Any] | None:
    """The same in the contents of a config.json, where multimodal ones keep it too."""
    inner = data.get("text_config") if isinstance(data.get("text_config"), dict) else {}
    for place in (data, inner or {}):
        for key in ("quantization_config", "compression_config"):
            found = place.get(key)
            if found is not None:
                if not isinstance(found, dict):
                    raise ConfigError(f"{key} is {found!r}; it must be an object")
                return found
    return None


def parse_quantization(data: dict[str, Any], names: Iterable[str] = ()) -> Quantization:
    """Read a ``quantization_config``.

    Args:
        data: its contents.
        names: of the tensors on disk, for what some configs leave open.

    Raises:
        ConfigError: an unknown method, format or value.
    """
    method = data.get("quant_method")
    reader = METHODS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise ConfigError(
            f"quantization_config: quant_method {method!r} is not known",
            hint="known: " + ", ".join(METHODS),
        )
    return reader(data, names)


def _fp8(data: dict[str, Any], names: Iterable[str]) -> Quantization:
    del names
    known = {"quant_method", "fmt", "activation_scheme", "weight_block_size", "scale_fmt",
             "modules_to_not_convert", "ignored_layers", "dequantize"}  # fmt: skip
    _refuse_unknown("fp8", data, known)
    _demand("fp8", data, "fmt", "e4m3", "e4m3", "float8_e4m3fn")
    _demand("fp8", data, "activation_scheme", "dynamic", "dynamic")
    block = data.get("weight_block_size")
    pair = _pair(block)
    if pair is None:
        raise ConfigError(
            f"fp8: weight_block_size is {block!r}; two block sizes are needed",
            hint="the official checkpoints have [128, 128]",
        )
    listed = data.get("modules_to_not_convert")
    if listed is None:
        listed = data.get("ignored_layers")
    scheme = Fp8Scheme(pair)
    ignore = NameList(_list("fp8", "modules_to_not_convert", listed), "modules_to_not_convert")
    return Quantization("fp8", ((None, scheme),), ignore)


def _gptq(data: dict[str, Any], names: Iterable[str]) -> Quantization:
    _demand("gptq", data, "bits", None, 4)
    kind = data.get("checkpoint_format") or data.get("format") or "gptq"
    if kind not in ("gptq", "gptq_v2"):
        raise ConfigError(f"gptq: checkpoint_format {kind!r} is not known",
                          hint="known: gptq, gptq_v2")  # fmt: skip
    size = _group_size("gptq", data)
    g_idx = bool(data.get("desc_act")) or any(n.endswith(".g_idx") for n in names)

    def scheme(group_size: int) -> GptqScheme:
        return GptqScheme(group_size, g_idx, kind == "gptq")

    targets: list[tuple[NameList | None, Scheme | None]] = []
    dynamic = data.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise ConfigError(f"gptq: dynamic is {dynamic!r}; it must be an object")
    for pattern, changes in dynamic.items():
        names_of = NameList([f"re:{re.sub('^[+-]:', '', pattern)}"], "dynamic")
        if pattern.startswith("-:"):
            targets.append((names_of, None))
        else:
            merged = {**data, **(changes if isinstance(changes, dict) else {})}
            _demand("gptq dynamic", merged, "bits", None, 4)
            targets.append((names_of, scheme(_group_size("gptq dynamic", merged))))
    targets.append((None, scheme(size)))
    ignore = _list("gptq", "modules_to_not_convert", data.get("modules_to_not_convert"))
    return Quantization(
        "gptq", tuple(targets), NameList(ignore, "modules_to_not_convert"), by_files=True
    )


def _awq(data: dict[str, Any], names: Iterable[str]) -> Quantization:
    del names
    data = {"bits": data.get("w_bit"), "group_size": data.get("q_group_size"), **data}
    _demand("awq", data, "bits", None, 4)
    version = data.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise ConfigError(f"awq: version {version!r} is not known", hint="known: gemm")
    ignore = _list("awq", "modules_to_not_convert", data.get("modules_to_not_convert"))
    scheme = AwqScheme(_group_size("awq", data), data.get("zero_point", True) is not False)
    return Quantization("awq", ((None, scheme),), NameList(ignore, "modules_to_not_convert"))


def _compressed(data: dict[str, Any], names: Iterable[str]) -> Quantization:
    del names
    what = "compressed-tensors"
    _refuse_unknown(what, data, {
        "quant_method", "config_groups", "format", "ignore", "kv_cache_scheme", "version",
        "quantization_status", "global_compression_ratio", "sparsity_config", "transform_config",
        "moe_sparsity_config",
    })  # fmt: skip
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"):
        if data.get(key):
            raise ConfigError(f"{what}: {key} is not supported", hint="it must be null or empty")
    status = data.get("quantization_status", "compressed")
    if status != "compressed":
        raise ConfigError(f"{what}: quantization_status is {status!r}, not 'compressed'")
    groups = data.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError(f"{what}: config_groups is {groups!r}; it must hold a group")
    named: list[tuple[NameList | None, Scheme | None]] = []
    general: list[tuple[NameList | None, Scheme | None]] = []
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise ConfigError(f"{what}: config_groups.{name} is {group!r}, not an object")
        scheme = _compressed_scheme(f"{what} {name}", group, data.get("format"))
        targets = _list(what, f"{name}.targets", group.get("targets"))
        if "Linear" in targets:
            general.append((None, scheme))
        elif targets:
            named.append((NameList(targets, f"{name}.targets"), scheme))
    ignore = _list(what, "ignore", data.get("ignore"))
    return Quantization("compressed-tensors", (*named, *general), NameList(ignore, "ignore"))


def _compressed_scheme(what: str, group: dict[str, Any], outer: Any) -> Scheme:
    kind, weights = group.get("format") or outer, group.get("weights")
    if not isinstance(weights, dict):
        raise ConfigError(f"{what}: no weights are described")
    if group.get("output_activations"):
        raise ConfigError(f"{what}: output_activations are not supported")
    inputs = group.get("input_activations") or {}
    if inputs and not inputs.get("dynamic"):
        raise ConfigError(f"{what}: input_activations with stored scales are not supported",
                          hint="dynamic activation scales are fine")  # fmt: skip
    bits, number = weights.get("num_bits"), weights.get("type", "int")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "group" if size and size > 0 else "channel" if size == -1 else "tensor"
    symmetric = weights.get("symmetric", True) is not False
    if kind in ("pack-quantized", "pack_quantized") and (bits, number) == (4, "int"):
        size = 0 if strategy == "channel" else size
        if strategy not in ("group", "channel") or type(size) is not int or size < 0:
            raise ConfigError(f"{what}: strategy {strategy!r} with group_size {size!r} is not "
                              "known", hint="known: group, channel")  # fmt: skip
        ordered = weights.get("actorder") in ("group", "dynamic", True)
        return Int4Scheme(size, symmetric, g_idx=ordered)
    if kind in ("float-quantized", "naive-quantized") and (bits, number) == (8, "float"):
        if not symmetric:
            raise ConfigError(f"{what}: FP8 weights with zero points are not known")
        pair = _pair(weights.get("block_structure"))
        if strategy == "block" and pair is not None:
            return Fp8Scheme(pair, ".weight_scale")
        if strategy in ("channel", "tensor"):
            return Fp8Scheme((1, 0) if strategy == "channel" else (0, 0), ".weight_scale")
        raise ConfigError(f"{what}: strategy {strategy!r} is not known",
                          hint="known: block, channel, tensor")  # fmt: skip
    raise ConfigError(
        f"{what}: format {kind!r} with {bits!r}-bit {number!r} weights is not known",
        hint="known: pack-quantized with 4-bit int, float-quantized with 8-bit float",
    )


METHODS: Mapping[str, Callable[[dict[str, Any], Iterable[str]], Quantization]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
}


def _refuse_unknown(what: str, data: dict[str, Any], known: set[str]) -> None:
    extra = sorted(set(data) - known)
    if extra:
        raise ConfigError(f"quantization_config of {what} has unknown keys: {', '.join(extra)}",
                          hint="known: " + ", ".join(sorted(known)))  # fmt: skip


def _demand(what: str, data: dict[str, Any], key: str, default: Any, *allowed: Any) -> None:
    value = data.get(key)
    value = default if value is None else value
    if value not in allowed or isinstance(value, bool):
        raise ConfigError(f"{what}: {key} {value!r} is not supported",
                          hint="supported: " + ", ".join(map(str, allowed)))  # fmt: skip


def _group_size(what: str, data: dict[str, Any]) -> int:
    size = data.get("group_size")
    if type(size) is not int or size == 0 or size < -1:
        raise ConfigError(f"{what}: group_size is {size!r}; it must be positive, or -1")
    return max(size, 0)


def _pair(value: Any) -> tuple[int, int] | None:
    """Two positive whole numbers, or None."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    return (value[0], value[1]) if all(type(v) is int and v > 0 for v in value) else None


def _list(what: str, key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{what}: {key} is {value!r}; it must be a list of names")
    return value
