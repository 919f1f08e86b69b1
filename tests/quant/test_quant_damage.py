"""Whatever is wrong with a quantised folder is said before memory is filled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_folders import EVEN, export, write_config
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from qnext.checkpoint import load_model
from qnext.checkpoint.reader import SINGLE
from qnext.errors import (
    CheckpointError,
    ConfigError,
    DamagedFile,
    MissingTensor,
    QnextError,
    ShapeMismatch,
    UnexpectedTensor,
)

Tensors = dict[str, torch.Tensor]
Q = "model.layers.1.self_attn.q_proj"
QKVZ = "model.layers.0.linear_attn.in_proj_qkvz"
UP = "model.layers.0.mlp.experts.3.up_proj"
GATE = "model.layers.0.mlp.experts.3.gate_proj"
NORM = "model.norm.weight"


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model = tiny_model(torch.float32, **EVEN)
    names = {"fp8": "fp8 16x8", "int4": "int4, activation order", "gptq": "gptq_v2", "awq": "awq"}
    return {
        short: export(model, name, tmp_path_factory.mktemp(short))[0]
        for short, name in names.items()
    }


@pytest.fixture
def folder(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        for file in originals[name].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return copy


def edit(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / SINGLE, {"format": "pt"})


def refuse(
    folder: Path, error: type[QnextError], words: list[str], monkeypatch: pytest.MonkeyPatch,
    *, early: bool = True,
) -> None:  # fmt: skip
    """The error names the cause, and nothing was allocated if it can be seen early."""
    if early:

        def never(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("memory was filled")

        monkeypatch.setattr("qnext.checkpoint.load.empty_model", never)  # fmt: skip
    with pytest.raises(error) as caught:
        load_model(folder, device="cpu")
    assert isinstance(caught.value, error)
    for word in words:
        assert word in f"{caught.value} {caught.value.hint}"


def swap(a: str, b: str) -> Callable[[Tensors], None]:
    def change(t: Tensors) -> None:
        t[a], t[b] = t[b], t[a]

    return change


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda t: (t.pop(name), None)[1]


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda t: t.update({name: make(t[name])})


STACKED = {f"model.layers.0.mlp.experts.gate_up_proj{x}": torch.ones(8) for x in ("", "_scale_inv")}
CASES: dict[str, tuple[str, Callable[[Tensors], Any], type[QnextError], list[str]]] = {
    "missing scale": ("fp8", drop(Q + ".weight_scale_inv"), MissingTensor,
                      [Q + ".weight_scale_inv"]),
    "missing scale of an expert": ("fp8", drop(UP + ".weight_scale_inv"), MissingTensor,
                                   [UP + ".weight_scale_inv"]),
    "a scale alone": ("fp8", drop(Q + ".weight"), MissingTensor, [Q + ".weight"]),
    "a scale of the wrong shape": ("fp8", put(Q + ".weight_scale_inv", lambda x: x[:, :-1]),
                                   ShapeMismatch, [Q + ".weight_scale_inv"]),
    "scales of other blocks": (
        "fp8", put(Q + ".weight_scale_inv", lambda x: x.repeat_interleave(2, 0)), ShapeMismatch,
        [Q + ".weight_scale_inv", "F32"]),
    "scales in whole numbers": ("fp8", put(Q + ".weight_scale_inv", lambda x: x.int()),
                                ShapeMismatch, [Q, "I32", "BF16"]),
    "bytes of no format": ("fp8", put(Q + ".weight", lambda x: x.view(torch.uint8)), ShapeMismatch,
                           [Q + ".weight", "U8", "F8_E4M3"]),
    "e5m2": ("fp8", put(Q + ".weight", lambda x: x.to(torch.float8_e5m2)), ShapeMismatch,
             [Q + ".weight", "F8_E5M2"]),
    "plain against the list": (
        "fp8", lambda t: (t.pop(Q + ".weight_scale_inv"),
                          t.update({Q + ".weight": t[Q + ".weight"].bfloat16()})),
        MissingTensor, [Q, "plain"]),
    "a scale where the list has none": (
        "fp8", lambda t: t.update({"mtp.fc.weight_scale_inv": torch.ones(1, 1)}), CheckpointError,
        ["mtp.fc", "stays unquantised", "mtp.fc.weight_scale_inv"]),
    "fp8 where the list has none": (
        "fp8", put("mtp.fc.weight", lambda x: x.to(torch.float8_e4m3fn)), CheckpointError,
        ["mtp.fc.weight", "stays unquantised"]),
    "a scale of a norm": ("fp8", lambda t: t.update({"model.norm.weight_scale_inv": torch.ones(1)}),
                          UnexpectedTensor, ["model.norm.weight_scale_inv"]),
    "a plain expert among packed ones": (
        "gptq", lambda t: (t.update({UP + ".weight": torch.ones(24, 32)}),
                           [t.pop(f"{UP}.{s}") for s in ("qweight", "qzeros", "scales", "g_idx")]),
        CheckpointError, [UP, "plain", "experts.gate_up_proj"]),
    "missing zeros": ("gptq", drop(Q + ".qzeros"), MissingTensor, [Q + ".qzeros"]),
    "missing order": ("gptq", drop(Q + ".g_idx"), MissingTensor, [Q + ".g_idx"]),
    "missing words": ("gptq", drop(Q + ".qweight"), MissingTensor, [Q + ".qweight"]),
    "nothing of a module": (
        "gptq", lambda t: [t.pop(f"{Q}.{s}") for s in ("qweight", "qzeros", "scales", "g_idx")],
        MissingTensor, [Q + ".qweight"]),
    "words and a plain weight": (
        "gptq", lambda t: t.update({Q + ".weight": torch.ones(128, 32)}), UnexpectedTensor,
        [Q + ".weight"]),
    "words in int64": ("gptq", put(Q + ".qweight", lambda x: x.long()), ShapeMismatch,
                       [Q + ".qweight", "I64"]),
    "scales of another group size": ("gptq", put(Q + ".scales", lambda x: x[:2]), ShapeMismatch,
                                     [Q + ".scales"]),
    "stacked experts": ("awq", lambda t: t.update(STACKED), CheckpointError,
                        ["model.layers.0.mlp.experts.gate_up_proj", "stacked", "awq"]),
    "missing shape": ("int4", drop(Q + ".weight_shape"), MissingTensor, [Q + ".weight_shape"]),
    "missing zero points": ("int4", drop(Q + ".weight_zero_point"), MissingTensor,
                            [Q + ".weight_zero_point"]),
    "awq words where gptq's should be": ("awq", swap(Q + ".qweight", Q + ".qzeros"), ShapeMismatch,
                                         [Q + ".qweight", Q + ".qzeros"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tensors_against_the_config(
    case: str, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, change, error, words = CASES[case]
    where = folder(name)
    edit(where, change)
    refuse(where, error, words, monkeypatch)


def poison(x: torch.Tensor, value: float) -> torch.Tensor:
    x.view(-1)[-1:] = value
    return x


def poison_byte(x: torch.Tensor, value: int) -> torch.Tensor:
    x.view(torch.uint8).view(-1)[5] = value
    return x


CONTENTS: dict[str, tuple[str, Callable[[Tensors], Any], list[str]]] = {
    "NaN scale": ("fp8", put(Q + ".weight_scale_inv", lambda x: poison(x, float("nan"))),
                  [Q + ".weight_scale_inv", "NaN"]),
    "infinite scale of a permuted matrix": (
        "fp8", put(QKVZ + ".weight_scale_inv", lambda x: poison(x, float("inf"))),
        [QKVZ + ".weight_scale_inv", "NaN or infinite"]),
    "NaN in fp8": ("fp8", put(UP + ".weight", lambda x: poison_byte(x, 0x7F)),
                   [UP + ".weight", "NaN"]),
    "negative NaN in fp8": ("fp8", put(QKVZ + ".weight", lambda x: poison_byte(x, 0xFF)),
                            [QKVZ + ".weight", "NaN"]),
    "NaN in a plain norm": ("fp8", put(NORM, lambda x: poison(x, float("nan"))), [NORM]),
    "NaN in int4 scales": ("int4", put(Q + ".weight_scale", lambda x: poison(x, float("nan"))),
                           [Q + ".weight_scale", "NaN"]),
    "a shape that lies": ("int4", put(Q + ".weight_shape", lambda x: x.flip(0)),
                          [Q + ".weight_shape", "[32, 128]"]),
    "a group that is none": ("int4", put(Q + ".weight_g_idx", lambda x: x + 1),
                             [Q + ".weight_g_idx", "0..3"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTENTS)
def test_contents(
    case: str, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, change, words = CONTENTS[case]
    where = folder(name)
    edit(where, change)
    refuse(where, CheckpointError, words, monkeypatch, early=False)


def test_the_largest_numbers_are_numbers(folder: Callable[[str], Path]) -> None:
    where = folder("fp8")
    edit(where, put(Q + ".weight", lambda x: poison_byte(x, 0x7E)))
    model = load_model(where, device="cpu")
    assert model.model.layers[1].self_attn.q_proj.weight.values.view(-1)[5] == 448


def test_truncated(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    where = folder("int4")
    raw = (where / SINGLE).read_bytes()
    (where / SINGLE).write_bytes(raw[:-100])
    refuse(where, DamagedFile, ["truncated"], monkeypatch)


def test_a_file_that_shrinks_while_it_is_read(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qnext.checkpoint import load

    where, build = folder("fp8"), load.empty_model

    def shrink(*args: Any, **kwargs: Any) -> Any:
        raw = (where / SINGLE).read_bytes()
        (where / SINGLE).write_bytes(raw[: len(raw) // 2])
        return build(*args, **kwargs)

    monkeypatch.setattr(load, "empty_model", shrink)
    refuse(where, DamagedFile, ["ends within"], monkeypatch, early=False)


def change_config(folder: Path, **changes: Any) -> None:
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    found |= changes
    write_config(folder, quantization_config={k: v for k, v in found.items() if v != "absent"})


def one_group(**changes: Any) -> dict[str, Any]:
    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8,
            "symmetric": False, "actorder": "group"}  # fmt: skip
    return {"group_0": {"targets": ["Linear"], "weights": args | changes}}


CONFIGS: dict[str, tuple[str, dict[str, Any], type[QnextError], list[str]]] = {
    "unknown method": ("fp8", {"quant_method": "bitsandbytes"}, ConfigError,
                       ["bitsandbytes", "known: fp8, compressed-tensors, gptq, awq"]),
    "no method": ("fp8", {"quant_method": "absent"}, ConfigError, ["None"]),
    "e5m2": ("fp8", {"fmt": "e5m2"}, ConfigError, ["fmt", "e5m2"]),
    "static activations": ("fp8", {"activation_scheme": "static"}, ConfigError,
                           ["activation_scheme", "static"]),
    "no blocks": ("fp8", {"weight_block_size": None}, ConfigError, ["weight_block_size"]),
    "three blocks": ("fp8", {"weight_block_size": [1, 2, 3]}, ConfigError, ["[1, 2, 3]"]),
    "blocks of zero": ("fp8", {"weight_block_size": [0, 128]}, ConfigError, ["[0, 128]"]),
    "other blocks": ("fp8", {"weight_block_size": [128, 128]}, ShapeMismatch, ["weight_scale_inv"]),
    "unknown key": ("fp8", {"weight_blocks": 3}, ConfigError, ["weight_blocks"]),
    "a list that is none": ("fp8", {"modules_to_not_convert": "lm_head"}, ConfigError,
                            ["modules_to_not_convert"]),
    "a list of numbers": ("fp8", {"modules_to_not_convert": [3]}, ConfigError, ["[3]"]),
    "an empty list": ("fp8", {"modules_to_not_convert": []}, MissingTensor,
                      ["in_proj_ba", "plain"]),
    "a list with too much": (
        "fp8", {"modules_to_not_convert": ["self_attn", "in_proj_ba"]}, CheckpointError,
        [Q, "stays unquantised", "list"]),
    "half of a fused name": ("fp8", {"modules_to_not_convert": ["linear_attn.in_proj_b"]},
                             ConfigError, ["in_proj_b of", "in_proj_ba", "in_proj_a"]),
    "unknown format": (
        "int4", {"format": "marlin-24", "config_groups": one_group()}, ConfigError, ["marlin-24"]),
    "8 bits": ("int4", {"config_groups": one_group(num_bits=8)}, ConfigError, ["8-bit"]),
    "no groups": ("int4", {"config_groups": {}}, ConfigError, ["config_groups"]),
    "a quantised cache": ("int4", {"kv_cache_scheme": {"num_bits": 8}}, ConfigError,
                          ["kv_cache_scheme"]),
    "not compressed": ("int4", {"quantization_status": "frozen"}, ConfigError, ["frozen"]),
    "group size of another": ("int4", {"config_groups": one_group(group_size=16)}, ShapeMismatch,
                              ["weight_scale"]),
    "group size that does not divide": (
        "awq", {"group_size": 7}, ConfigError, ["group_size 7", "32 columns"]),
    "unknown pattern": ("int4", {"ignore": ["re:("]}, ConfigError, ["'re:('", "no pattern"]),
    "3 bits": ("gptq", {"bits": 3}, ConfigError, ["bits 3"]),
    "marlin": ("gptq", {"checkpoint_format": "marlin"}, ConfigError, ["marlin"]),
    "no group size": ("gptq", {"group_size": "absent"}, ConfigError, ["group_size"]),
    "gemv": ("awq", {"version": "gemv"}, ConfigError, ["gemv"]),
    "8-bit awq": ("awq", {"bits": 8}, ConfigError, ["bits 8"]),
    "another method": ("awq", {"quant_method": "gptq"}, ShapeMismatch, [QKVZ + ".qweight"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_quantization_config_that_cannot_be(
    case: str, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes, error, words = CONFIGS[case]
    where = folder(name)
    change_config(where, **changes)
    refuse(where, error, words, monkeypatch)


def test_no_object(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    where = folder("fp8")
    write_config(where, quantization_config="fp8")
    refuse(where, ConfigError, ["quantization_config", "object"], monkeypatch)


def test_no_quantization_config(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = folder("fp8")
    write_config(where, quantization_config=None)
    refuse(where, CheckpointError, ["quantised weights", "no quantization_config"], monkeypatch)
