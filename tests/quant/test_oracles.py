"""Other people's readers and writers: transformers and compressed-tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from quantised_folders import EVEN, FORMATS, awq, draw_int4, pack_quantized
from tiny import draw_ids, tiny_model

from qnext.checkpoint import load_model, save_model
from qnext.checkpoint.quantize import quantize
from qnext.checkpoint.save import PlainParameters, gather
from qnext.kernels.scaled_matmul.reference import unpack_nibbles
from qnext.quant.int4 import Int4Scheme, pack_nibbles
from qnext.weights import disk_tensors

# Every block of 128 is whole, or the matrix is smaller than one: transformers infers blocks from
# the grid of scales, which is ambiguous for other sizes.
WHOLE: dict[str, Any] = {
    **EVEN, "hidden_size": 128, "head_dim": 32, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64, "linear_num_value_heads": 4, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64, "intermediate_size": 128,
    "num_nextn_predict_layers": 0,
}  # fmt: skip


def theirs(folder: Path, dtype: torch.dtype) -> Any:
    model, report = transformers.Qwen3NextForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, attn_implementation="eager",
        experts_implementation="eager",
    )  # fmt: skip
    assert not {k: v for k, v in report.items() if v}
    return model.eval()


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_transformers_reads_what_we_write(format: str, tmp_path: Path) -> None:
    model = tiny_model(torch.bfloat16, **WHOLE)
    save_model(model, tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "packed", format=format, group_size=32)
    dtype = torch.float32 if format == "fp8" else torch.bfloat16
    ours, other = load_model(tmp_path / "packed", dtype=dtype), theirs(tmp_path / "packed", dtype)
    ids = draw_ids(ours, 40)[None]
    with torch.no_grad():
        got, expected = ours(ids).logits.float(), other(ids).logits.float()
    bound = 1e-4 if format == "fp8" else 0.03
    assert (got - expected).abs().max() < bound * expected.abs().max()
    # Only now: transformers decompresses INT4 when a model runs for the first time.
    params, found = PlainParameters(ours, dtype), dict(other.named_parameters())
    rules = [rule for rule in disk_tensors(ours.config, fused_experts=True) if not rule.optional]
    found = {n: p for n, p in found.items() if not n.endswith(("weight_scale", "weight_shape"))}
    assert {rule.name for rule in rules} == set(found)
    for rule in rules:
        assert torch.equal(gather(rule, params, dtype), found[rule.name].to(dtype)), rule.name


@pytest.mark.parametrize("shape", [(8, 32), (5, 24), (16, 8)])
def test_words_are_those_of_compressed_tensors(shape: tuple[int, int]) -> None:
    values = torch.from_numpy(np.random.default_rng(0).integers(-8, 8, shape)).to(torch.int8)
    packed = pack_nibbles(values + 8)
    assert torch.equal(packed, pack_to_int32(values, 4))
    assert torch.equal(unpack_nibbles(packed)[:, : shape[1]].to(torch.int8) - 8,
                       unpack_from_int32(packed, 4, torch.Size(shape)))  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_means_the_same(symmetric: bool) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    pieces, truth = pack_quantized(torch.empty(16, 32), np.random.default_rng(1), 8, symmetric,
                                   False)  # fmt: skip
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=8,
                            symmetric=symmetric)  # fmt: skip
    state = {name.removeprefix("."): tensor for name, tensor in pieces.items()}
    state["weight_scale"] = state["weight_scale"].float()
    out = PackedQuantizationCompressor.decompress(
        state, QuantizationScheme(targets=["Linear"], weights=args)
    )
    assert torch.equal(out["weight"], truth)


def test_what_we_encode_decompresses_to_what_we_compute() -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    pieces = Int4Scheme(32).encode(weight)
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32)
    state = {name.removeprefix("."): tensor for name, tensor in pieces.items()}
    out = PackedQuantizationCompressor.decompress(
        dict(state), QuantizationScheme(targets=["Linear"], weights=args)
    )["weight"]
    assert out.dtype == torch.bfloat16
    assert (out - weight).abs().max() < 0.6 * state["weight_scale"].max()
    again = unpack_nibbles(state["weight_packed"]).float() - 8
    ours = (again.unflatten(1, (2, 32)) * state["weight_scale"].float()[..., None]).flatten(1)
    assert torch.equal(ours.bfloat16(), out)


def test_awq_words_are_those_of_its_converter() -> None:
    pieces, truth = awq(torch.empty(16, 32), np.random.default_rng(2), 8)
    tensors = AutoAWQConverter(group_size=8).process(
        {f"model.q_proj{name}": tensor.clone() for name, tensor in pieces.items()}
    )
    found = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    values = unpack_from_int32(found["weight_packed"], 4, torch.Size((16, 32))).float()
    zero = unpack_from_int32(found["weight_zero_point"], 4, torch.Size((16, 4)), packed_dim=0)
    scale = found["weight_scale"].float()
    shifted = values - zero.float().repeat_interleave(8, 1)
    assert torch.equal(shifted * scale.repeat_interleave(8, 1), truth)


def test_the_packers_of_these_tests_draw_every_nibble() -> None:
    u, zero, *_ = draw_int4(torch.Size((32, 64)), np.random.default_rng(0), 8, False, True)
    assert set(u.flatten()) == set(range(16))
    assert set(zero.flatten()) == set(range(1, 16))
    assert len(FORMATS) == 13
