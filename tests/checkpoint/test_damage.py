"""Every damaged or lying folder is refused quickly, by name, before a weight is allocated."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from qnext.checkpoint import load, load_model, save_model
from qnext.checkpoint.reader import INDEX, SINGLE, SafetensorsFolder
from qnext.errors import (
    CheckpointError,
    ConfigError,
    DamagedFile,
    MissingTensor,
    QnextError,
    ShapeMismatch,
    UnexpectedTensor,
)

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    model = tiny_model(torch.float32)
    save_model(model, root / "single")
    save_model(model, root / "sharded", max_shard_size=20_000)
    return root


@pytest.fixture
def single(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "single", tmp_path / "single"))


@pytest.fixture
def sharded(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "sharded", tmp_path / "sharded"))


def refuse(
    folder: Path,
    error: type[QnextError],
    *words: str,
    monkeypatch: pytest.MonkeyPatch | None = None,
) -> None:
    """Loading raises exactly this class, with these words, within a second."""
    if monkeypatch is not None:
        monkeypatch.setattr(load, "empty_model", lambda *_: pytest.fail("weights were allocated"))
    started = time.perf_counter()
    with pytest.raises(QnextError) as caught:
        load_model(folder, device="cpu")
    assert time.perf_counter() - started < 1
    assert type(caught.value) is error, repr(caught.value)
    for word in words:
        assert word in str(caught.value)


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(file: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        header, data = split(file)
        change(header)
        join(file, header, data)

    return damage


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(change(file.read_bytes())) and None


def shift(name: str, begin: int, end: int) -> Callable[[Path], None]:
    def change(header: dict[str, Any]) -> None:
        offsets = header[name]["data_offsets"]
        header[name]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return edit_header(change)


def say_twice(file: Path) -> None:
    header, data = split(file)
    entry = json.dumps({EMBED: header[EMBED]})[1:-1]
    join(file, json.dumps(header).encode()[:-1] + b", " + entry.encode() + b"}", data)


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut in the data": (edit_bytes(lambda x: x[:-7]), "truncated"),
    "cut in the header": (edit_bytes(lambda x: x[:100]), "no whole safetensors file"),
    "cut in the length": (edit_bytes(lambda x: x[:5]), "no whole safetensors file"),
    "empty": (edit_bytes(lambda x: b""), "no whole safetensors file"),
    "too long": (edit_bytes(lambda x: x + b"12"), "too long"),
    "length zero": (edit_bytes(lambda x: bytes(8) + x[8:]), "not JSON"),
    "length too short": (edit_bytes(lambda x: (50).to_bytes(8, "little") + x[8:]), "not JSON"),
    "length huge": (edit_bytes(lambda x: (1 << 62).to_bytes(8, "little") + x[8:]), "takes"),
    "length minus one": (edit_bytes(lambda x: b"\xff" * 8 + x[8:]), "takes"),
    "a pickle": (edit_bytes(lambda x: b"\x80\x04\x95 and so on, much longer"), "takes"),
    "header no JSON": (lambda f: join(f, b"{'a': 1}", b""), "not JSON"),
    "header no UTF-8": (lambda f: join(f, b'{"\xff\xfe": 1}', b""), "not JSON"),
    "header a list": (lambda f: join(f, b"[1, 2]", b""), "not an object"),
    "header nested": (lambda f: join(f, b'{"a":' * 50_000 + b"1", b""), "not JSON"),
    "header with a giant number": (
        lambda f: join(f, b'{"a": ' + b"9" * 5000 + b"}", b""), "not JSON"),
    "entry no object": (edit_header(lambda h: h.update({EMBED: 3})), EMBED),
    "entry without offsets": (edit_header(lambda h: h[EMBED].pop("data_offsets")), EMBED),
    "entry with one offset": (edit_header(lambda h: h[EMBED].update(data_offsets=[0])), EMBED),
    "negative offset": (shift(EMBED, -(10**9), 0), EMBED),
    "fractional shape": (edit_header(lambda h: h[EMBED].update(shape=[61.0, 24])), EMBED),
    "negative shape": (edit_header(lambda h: h[EMBED].update(shape=[-61, -24])), EMBED),
    "unknown dtype": (edit_header(lambda h: h[EMBED].update(dtype="F31")), EMBED),
    "dtype a list": (edit_header(lambda h: h[EMBED].update(dtype=["F32"])), EMBED),
    "shape against bytes": (edit_header(lambda h: h[EMBED].update(shape=[61, 25])), EMBED),
    "overlap": (shift(EMBED, -8, -8), "overlap"),
    "gap": (shift(EMBED, 8, 8), ""),
    "entry dropped": (edit_header(lambda h: h.pop(EMBED)), "gap"),
    "a name twice": (say_twice, f"{EMBED!r} twice"),
    "metadata of numbers": (
        edit_header(lambda h: h.update(__metadata__={"format": 1})), "metadata"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_damaged_file(case: str, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage, words = FILES[case]
    damage(single / SINGLE)
    refuse(single, DamagedFile, SINGLE, words, monkeypatch=monkeypatch)


@settings(max_examples=150)
@given(data=st.data())
def test_no_damage_of_the_header_escapes_the_error_tree(
    data: st.DataObject, originals: Path
) -> None:
    raw = bytearray((originals / "single" / SINGLE).read_bytes())
    length = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    folder = originals / "fuzzed"
    folder.mkdir(exist_ok=True)
    shutil.copy(originals / "single/config.json", folder)
    (folder / SINGLE).write_bytes(raw)
    # Some damage is harmless (a metadata value, a name swapped for itself).
    with contextlib.suppress(CheckpointError):
        load_model(folder, device="cpu")


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "place", ["../single/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, None]
)
def test_paths_in_an_index(place: Any, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_index(sharded, lambda i: i["weight_map"].update({EMBED: place}))
    refuse(sharded, DamagedFile, EMBED, repr(place), monkeypatch=monkeypatch)


def test_missing_shard(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    refuse(sharded, CheckpointError, "1 of", gone.name, monkeypatch=monkeypatch)


def test_index_names_a_tensor_that_is_nowhere(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0].name
    edit_index(sharded, lambda i: i["weight_map"].update({"model.ghost": shard}))
    refuse(sharded, MissingTensor, "model.ghost", monkeypatch=monkeypatch)


def test_index_forgets_a_tensor(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_index(sharded, lambda i: i["weight_map"].pop(EMBED))
    refuse(sharded, UnexpectedTensor, EMBED, monkeypatch=monkeypatch)


def test_index_places_a_tensor_in_the_wrong_file(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = sorted(sharded.glob("*.safetensors"))[-1].name
    edit_index(sharded, lambda i: i["weight_map"].update({EMBED: last}))
    refuse(sharded, DamagedFile, EMBED, "wrong file", monkeypatch=monkeypatch)


def test_a_tensor_in_two_shards(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    save_file(load_file(last) | {EMBED: load_file(first)[EMBED]}, last)
    refuse(sharded, DamagedFile, EMBED, first.name, last.name, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not JSON"), ("[]", "not a JSON object"), ("{}", "no weight_map"),
     ('{"weight_map": []}', "no weight_map"), ('{"weight_map": {}}', "no weight_map"),
     ('{"weight_map": {"a": "x", "a": "y"}}', "'a' twice"), ('{"a":' * 50_000, "not JSON"),
     ("9" * 5000, "not JSON")],
)  # fmt: skip
def test_broken_index(
    text: str, words: str, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sharded / INDEX).write_text(text)
    refuse(sharded, DamagedFile, INDEX, words, monkeypatch=monkeypatch)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


NORM = "model.layers.0.input_layernorm.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
Change = Callable[[dict[str, torch.Tensor]], Any]
TENSORS: dict[str, tuple[Change, type[QnextError], list[str]]] = {
    "extra": (lambda t: t.update({"model.extra": torch.ones(1)}), UnexpectedTensor,
              ["model.extra"]),
    "vision tower in a text model": (
        lambda t: t.update({"model.visual.x": torch.ones(1)}), UnexpectedTensor,
        ["model.visual.x"]),
    "missing": (lambda t: (t.pop(NORM), t.pop(EXPERT)), MissingTensor, [NORM, EXPERT, "2 of"]),
    "misspelt": (lambda t: t.update({"model.norms.weight": t.pop("model.norm.weight")}),
                 UnexpectedTensor, ["model.norms.weight"]),
    "mis-shaped": (lambda t: t.update({EXPERT: t[EXPERT][:-1].clone()}), ShapeMismatch,
                   [EXPERT, "[9, 24]", "[10, 24]"]),
    "transposed": (lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}), ShapeMismatch, [EXPERT]),
    "integers": (lambda t: t.update({NORM: t[NORM].long()}), ShapeMismatch, [NORM, "I64"]),
    "float8": (lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}), ShapeMismatch,
               [NORM, "F8_E4M3"]),
    "quantised": (lambda t: t.update({EMBED + "_scale_inv": torch.ones(1)}), CheckpointError,
                  ["quantised", EMBED]),
    "empty": (lambda t: t.clear(), MissingTensor, [EMBED]),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_against_the_config(
    case: str, single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, error, words = TENSORS[case]
    edit_tensors(single, change)
    refuse(single, error, *words, monkeypatch=monkeypatch)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [EMBED, EXPERT, NORM])
def test_weights_that_are_no_numbers(value: float, name: str, single: Path) -> None:
    edit_tensors(single, lambda t: t[name].view(-1)[-1:].fill_(value))
    refuse(single, CheckpointError, name, "NaN or infinite")


def test_large_weights_are_numbers(single: Path) -> None:
    edit_tensors(single, lambda t: t[NORM].fill_(3e38))
    assert load_model(single, device="cpu").model.layers[0].input_layernorm.weight[0] == 3e38


LIES: dict[str, tuple[dict[str, Any], type[QnextError], list[str]]] = {
    "wider": ({"hidden_size": 26}, ShapeMismatch, [EMBED, "[61, 24]", "[61, 26]"]),
    "more words": ({"vocab_size": 10**15}, ShapeMismatch, [EMBED, HEAD]),
    "more heads": ({"num_attention_heads": 8}, ShapeMismatch, ["q_proj"]),
    "fewer layers": ({"num_hidden_layers": 3, "layer_types": None}, UnexpectedTensor, ["layers."]),
    "more experts": ({"num_experts": 7}, MissingTensor, ["experts.6."]),
    "fewer experts": ({"num_experts": 5}, UnexpectedTensor, ["experts.5."]),
    "dense": ({"mlp_only_layers": [0, 1, 2, 3]}, UnexpectedTensor, ["experts"]),
    "other taps": ({"linear_conv_kernel_dim": 3}, ShapeMismatch, ["conv1d"]),
    "other family": ({"model_type": "qwen3_5_moe"}, UnexpectedTensor, ["in_proj_qkvz"]),
    "other layer kinds": (
        {"layer_types": ["full_attention"] * 4}, UnexpectedTensor, ["linear_attn"]),
    "a billion layers": (
        {"num_hidden_layers": 10**9, "layer_types": None}, ConfigError, ["num_hidden_layers"]),
    "a billion experts": ({"num_experts": 10**9}, ConfigError, ["num_experts"]),
    "a tied head that differs": ({"tie_word_embeddings": True}, CheckpointError, [HEAD, "tie"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_a_config_that_lies(case: str, single: Path) -> None:
    changes, error, words = LIES[case]
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | changes))
    refuse(single, error, *words)


def test_a_tied_head_that_is_equal_is_welcome(single: Path) -> None:
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    edit_tensors(single, lambda t: t.update({HEAD: t[EMBED].clone()}))
    assert load_model(single, device="cpu").lm_head is None


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_not_read(name: str, single: Path) -> None:
    (single / SINGLE).rename(single / name)
    refuse(single, CheckpointError, SINGLE, name)


def test_a_folder_with_nothing_in_it(tmp_path: Path) -> None:
    refuse(tmp_path, ConfigError, "config.json")


def test_a_folder_without_weights(single: Path) -> None:
    (single / SINGLE).unlink()
    refuse(single, CheckpointError, SINGLE, INDEX)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "9" * 5000, '{"a":' * 50_000])
def test_a_config_that_is_no_config(text: str, single: Path) -> None:
    (single / "config.json").write_bytes(text.encode("latin-1"))
    refuse(single, ConfigError, "config.json")


def test_a_file_is_no_folder(single: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        SafetensorsFolder(single / SINGLE)
