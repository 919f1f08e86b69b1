"""What ``qnext quantize`` makes of a model: a scheme for every module, and the config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from qnext.errors import ConfigError
from qnext.quant.format import Scheme
from qnext.quant.fp8 import Fp8Scheme
from qnext.quant.int4 import Int4Scheme
from qnext.quant.layout import module_of
from qnext.quant.names import NameList
from qnext.weights import DiskTensor

KEPT = ("lm_head", "mlp.gate", "shared_expert_gate", "in_proj_ba", "in_proj_b", "in_proj_a",
        "mtp.fc")  # fmt: skip
"""Modules that the official FP8 checkpoints leave in BF16."""
GROUP_SIZES = (32, 128)


@dataclass(frozen=True)
class QuantizePlan:
    """A scheme for every module that gets one.

    Attributes:
        format: ``fp8`` or ``int4``.
        group_size: of INT4; where it does not divide the columns, a common divisor takes its
            place.
        schemes: module name on disk -> scheme.
        kept: names on disk of everything else but the embedding and the final norm.
    """

    format: str
    group_size: int
    schemes: dict[str, Scheme]
    kept: tuple[str, ...]

    @classmethod
    def make(
        cls, rules: Iterable[DiskTensor], format: str, group_size: int, ignore: Sequence[str] = ()
    ) -> QuantizePlan:
        """Decide for every disk tensor of a plain checkpoint with experts stored one by one.

        Raises:
            ConfigError: an unknown format or group size; an ignored name that is no module.
        """
        if format not in ("fp8", "int4"):
            raise ConfigError(f"format {format!r} is not known", hint="known: fp8, int4")
        if group_size not in GROUP_SIZES:
            raise ConfigError(f"group size {group_size} is not offered",
                              hint="offered: " + ", ".join(map(str, GROUP_SIZES)))  # fmt: skip
        always, wished = NameList(KEPT, "kept"), NameList(ignore, "--ignore")
        single = [NameList([entry], "--ignore") for entry in ignore]
        hits = [False] * len(single)
        schemes: dict[str, Scheme] = {}
        kept: list[str] = []
        for rule in rules:
            stem = module_of(rule)
            if stem is not None:
                hits = [hit or stem in names for hit, names in zip(hits, single, strict=True)]
            if stem is None or stem in always or stem in wished:
                named = not rule.name.endswith(".bias") and rule.name not in NEVER_LISTED
                if named and not rule.optional:
                    kept.append(rule.name.removesuffix(".weight"))
                continue
            size = gcd(group_size, rule.shape[1])
            schemes[stem] = Fp8Scheme() if format == "fp8" else Int4Scheme(size)
        for entry, hit in zip(ignore, hits, strict=True):
            if not hit:
                raise ConfigError(f"--ignore {entry}: the model has no such module",
                                  hint="names are those of the files")  # fmt: skip
        if not schemes:
            raise ConfigError("nothing is left to quantise", hint="ignore less")
        return cls(format, group_size, schemes, tuple(kept))

    def config(self) -> dict[str, Any]:
        """The ``quantization_config`` of the result, as its readers know it."""
        if self.format == "fp8":
            return {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "modules_to_not_convert": list(self.kept),
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
            }
        sizes: dict[int, list[str]] = {}
        for stem, scheme in self.schemes.items():
            assert isinstance(scheme, Int4Scheme)
            sizes.setdefault(scheme.group_size, []).append(stem)
        groups: dict[str, Any] = {}
        for size in sorted(sizes, reverse=True):
            usual = size == max(sizes)
            targets = ["Linear"] if usual else _patterns(sizes[size])
            groups[f"group_{len(groups)}"] = {
                "targets": targets,
                "format": "pack-quantized",
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": size,
                            "symmetric": True, "dynamic": False, "actorder": None},
                "input_activations": None,
                "output_activations": None,
            }  # fmt: skip
        linear = [name for name in self.kept if name.endswith(_linear_leaves())]
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": linear,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


NEVER_LISTED = ("model.embed_tokens.weight", "model.norm.weight")


def _linear_leaves() -> tuple[str, ...]:
    """Last components of linear modules; other kept names need no mention in ``ignore``."""
    return ("_proj", "_gate", "gate", "lm_head", ".fc", "_ba", "_b", "_a", "_z", "_qkv", "_qkvz")


def _patterns(stems: Iterable[str]) -> list[str]:
    """One pattern for all modules that differ in numbers only."""
    found = dict.fromkeys(re.sub(r"\d+", r"\\d+", re.escape(stem)) for stem in stems)
    return [f"re:^{pattern}$" for pattern in found]
