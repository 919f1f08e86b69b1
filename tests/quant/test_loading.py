"""Packed folders mean what their plain twins hold, for all families and formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from quantised_folders import EVEN, FAMILIES, FORMATS, PLAIN, export, fp8, write_config
from safetensors.torch import load_file, save_file
from tiny import draw_ids, tiny_model, whole

from qnext.checkpoint import load_model
from qnext.checkpoint.reader import SINGLE
from qnext.layers.model import CausalLM
from qnext.layers.packed import PackedBatch
from qnext.quant.matrix import Fp8Matrix, Int4Matrix
from qnext.quant.modules import QuantExperts, QuantLinear
from qnext.quant.surgery import matrices


def make(family: str, dtype: torch.dtype = torch.float32) -> CausalLM:
    changes = {**EVEN, **FAMILIES[family]}
    return tiny_model(dtype, **{k: v for k, v in changes.items() if v is not None or k in (
        "layer_types",)})  # fmt: skip


def assert_same_weights(packed: CausalLM, truth: CausalLM) -> int:
    """Every parameter of the plain model is one of the packed, or what one means exactly."""
    plain, found = dict(packed.named_parameters()), matrices(packed)
    for name, weight in truth.named_parameters():
        if name in found:
            assert torch.equal(found[name].dequantise(weight.dtype), weight), name
        else:
            assert torch.equal(plain[name], weight), name
    return len(found)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_folder_is_its_plain_twin(family: str, name: str, tmp_path: Path) -> None:
    packed, truth = (
        load_model(folder, device="cpu").requires_grad_(False)
        for folder in export(make(family), name, tmp_path)
    )
    assert assert_same_weights(packed, truth) >= 20
    ids = draw_ids(truth, 33)
    expected = whole(truth, ids)
    torch.testing.assert_close(whole(packed, ids), expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(packed.logits(expected), truth.logits(expected))
    if truth.mtp is not None:
        batch = PackedBatch.of([len(ids)])
        torch.testing.assert_close(
            packed.draft_states(expected, ids.roll(-1), batch),
            truth.draft_states(expected, ids.roll(-1), batch),
            atol=2e-6, rtol=1e-5,
        )  # fmt: skip


def test_the_tree_holds_packed_bytes_and_nothing_else(tmp_path: Path) -> None:
    packed, truth = export(make("qwen3_next"), "fp8 128x128", tmp_path)
    model, plain = load_model(packed, device="cpu"), load_model(truth, device="cpu")
    layer = model.model.layers[0]
    assert isinstance(layer.linear_attn.in_proj_qkv, QuantLinear)
    assert isinstance(layer.mlp.experts, QuantExperts)
    assert not isinstance(layer.mlp.gate, QuantLinear)
    assert not isinstance(layer.linear_attn.in_proj_b, QuantLinear)
    for name, matrix in matrices(model).items():
        assert isinstance(matrix, Fp8Matrix)
        assert matrix.values.nbytes == plain.get_parameter(name).numel()
        assert not any(p.requires_grad for p in matrix.parameters())


def test_the_published_layout_keeps_whole_blocks() -> None:
    """At the real sizes every slice of in_proj_qkvz is a block, so no scale is repeated."""
    from qnext.checkpoint.census import detect_layout
    from qnext.config import ModelConfig

    config = ModelConfig.from_dict({
        "model_type": "qwen3_next", "vocab_size": 512, "hidden_size": 2048,
        "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 2,
        "head_dim": 256, "rope_theta": 1e7, "partial_rotary_factor": 0.25,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "norm_topk_prob": True, "max_position_embeddings": 4096,
    })  # fmt: skip
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                    "weight_block_size": [128, 128], "modules_to_not_convert": [
                        f"model.layers.{i}.linear_attn.in_proj_ba" for i in range(3)]}  # fmt: skip
    layout = detect_layout(config, (), quantization)
    shapes = {"model.layers.0.linear_attn.in_proj_qkv.weight": (8192, 2048),
              "model.layers.0.linear_attn.in_proj_z.weight": (4096, 2048),
              "model.layers.0.mlp.experts.gate_up_proj": (4, 1024, 2048),
              "model.layers.3.self_attn.q_proj.weight": (8192, 2048)}  # fmt: skip
    for name, shape in shapes.items():
        parameter = layout.packed[name]
        matrix = parameter.scheme.matrix(shape, parameter.sources, parameter.dtypes)
        assert isinstance(matrix, Fp8Matrix)
        assert matrix.block == (128, 128)
        assert matrix.scale.shape == (*shape[:-2], shape[-2] // 128, shape[-1] // 128)


def test_the_census_of_the_official_fp8_checkpoints() -> None:
    """Spec 8.1: 75,535 scales, 151,479 tensors with MTP, and scales of the shapes given there."""
    from qnext.checkpoint.census import detect_layout
    from qnext.config import ModelConfig
    from qnext.quant.plan import QuantizePlan
    from qnext.weights import disk_tensors

    config = ModelConfig.from_dict({
        "model_type": "qwen3_next", "vocab_size": 151936, "hidden_size": 2048,
        "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2,
        "head_dim": 256, "rope_theta": 1e7, "partial_rotary_factor": 0.25,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "num_experts": 512, "num_experts_per_tok": 10,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "norm_topk_prob": True, "max_position_embeddings": 262144,
        "num_nextn_predict_layers": 1, "eos_token_id": 151645,
    })  # fmt: skip
    listed = QuantizePlan.make(disk_tensors(config), "fp8", 128).config()
    tensors = detect_layout(config, (), listed).tensors
    assert len(tensors) == 151_479
    scales = {n: t.shape for n, t in tensors.items() if n.endswith(".weight_scale_inv")}
    assert len(scales) == 75_535
    expected = {
        "model.layers.0.linear_attn.in_proj_qkvz": (96, 16),
        "model.layers.0.linear_attn.out_proj": (16, 32),
        "model.layers.3.self_attn.q_proj": (64, 16),
        "model.layers.3.self_attn.k_proj": (4, 16),
        "model.layers.3.self_attn.o_proj": (16, 32),
        "mtp.layers.0.mlp.experts.511.up_proj": (4, 16),
        "model.layers.47.mlp.experts.0.down_proj": (16, 4),
    }
    for stem, shape in expected.items():
        assert scales[f"{stem}.weight_scale_inv"] == shape
    assert "mtp.fc.weight_scale_inv" not in scales
    assert "model.layers.0.linear_attn.in_proj_ba.weight_scale_inv" not in scales


def test_experts_stacked_on_disk(tmp_path: Path) -> None:
    """Stacked FP8 experts with stacked scales, as some exports of Qwen3.5 have them."""
    model = make("qwen3_5_moe")
    packed, truth = export(model, "fp8 16x8", tmp_path)
    tensors, plain = load_file(packed / SINGLE), load_file(truth / SINGLE)
    for layer in [*(f"model.layers.{i}" for i in range(4)), "mtp.layers.0"]:
        for leaf in ("gate_up_proj", "down_proj"):
            name, rng = f"{layer}.mlp.experts.{leaf}", np.random.default_rng(7)
            parts = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else [leaf]
            stacked, scales = [], []
            for e in range(8):
                stem = f"{layer}.mlp.experts.{e}."
                weight = torch.cat([plain.pop(f"{stem}{part}.weight") for part in parts])
                pieces, meaning = fp8(weight, rng, 16, 8)
                stacked.append((pieces[".weight"], meaning))
                scales.append(pieces[".weight_scale_inv"])
                for part in parts:
                    del tensors[f"{stem}{part}.weight"], tensors[f"{stem}{part}.weight_scale_inv"]
            tensors[name] = torch.stack([v.view(torch.uint8) for v, _ in stacked]).view(
                torch.float8_e4m3fn
            )
            tensors[name + "_scale_inv"] = torch.stack(scales)
            plain[name] = torch.stack([meaning for _, meaning in stacked])
    save_file(tensors, packed / SINGLE)
    save_file(plain, truth / SINGLE)
    assert assert_same_weights(load_model(packed), load_model(truth)) > 20


def test_two_formats_in_one_checkpoint(tmp_path: Path) -> None:
    """INT4 experts beside FP8 attention: config groups by name, the general one last."""
    model = make("qwen3_next")
    int4, int4_truth = export(model, "int4, zero points", tmp_path / "a")
    fp8s, fp8_truth = export(model, "float-quantized, rows", tmp_path / "b")
    experts = load_file(int4 / SINGLE), load_file(int4_truth / SINGLE)
    others = load_file(fp8s / SINGLE), load_file(fp8_truth / SINGLE)
    for (theirs, mine), folder in zip(
        zip(experts, others, strict=True), (int4, int4_truth), strict=True
    ):
        mixed = {n: t for n, t in mine.items() if ".experts." not in n}
        save_file(mixed | {n: t for n, t in theirs.items() if ".experts." in n}, folder / SINGLE)
    config = json.loads((int4 / "config.json").read_text())["quantization_config"]
    other = json.loads((fp8s / "config.json").read_text())["quantization_config"]
    config["format"] = "mixed-precision"
    config["config_groups"] = {
        "group_0": other["config_groups"]["group_0"],
        "group_1": config["config_groups"]["group_0"] | {"targets": ["re:.*mlp.experts.*"]},
    }
    write_config(int4, quantization_config=config)
    packed = load_model(int4)
    assert_same_weights(packed, load_model(int4_truth))
    kinds = {type(m) for m in matrices(packed).values()}
    assert kinds == {Fp8Matrix, Int4Matrix}


def test_a_plain_side_of_the_experts(tmp_path: Path) -> None:
    plain = (*PLAIN, *(f"experts.{e}.down_proj" for e in range(8)))
    packed, truth = export(make("qwen3_next"), "awq", tmp_path, plain=plain)
    model, twin = load_model(packed).requires_grad_(False), load_model(truth).requires_grad_(False)
    assert_same_weights(model, twin)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, Int4Matrix)
    assert isinstance(experts.down_proj, torch.nn.Parameter)
    ids = draw_ids(twin, 30)
    torch.testing.assert_close(whole(model, ids), whole(twin, ids), atol=2e-6, rtol=1e-5)


def test_an_odd_group_order_of_every_expert(tmp_path: Path) -> None:
    """Gate and up, and every expert, have an order of their own."""
    model = load_model(export(make("qwen3_next"), "gptq, activation order", tmp_path)[0])
    order = model.model.layers[0].mlp.experts.gate_up_proj.g_idx
    assert len({tuple(row.tolist()) for row in order.flatten(0, 1)}) == 16


def test_trivial_orders_and_zeros_are_dropped(tmp_path: Path) -> None:
    model = load_model(export(make("qwen3_next"), "gptq", tmp_path)[0], device="cpu")
    for matrix in matrices(model).values():
        assert isinstance(matrix, Int4Matrix)
        assert matrix.g_idx is None
        assert matrix.zero is None
    model = load_model(
        export(make("qwen3_next"), "gptq, activation order", tmp_path / "b")[0], device="cpu"
    )
    gate_up = model.model.layers[0].mlp.experts.gate_up_proj
    assert gate_up.g_idx.shape == (8, 2, 32)
    assert gate_up.zero is not None


@pytest.mark.parametrize("name", ["fp8 16x8", "int4, zero points"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_computing_in_another_dtype(name: str, dtype: str, tmp_path: Path) -> None:
    folders = export(make("qwen3_next"), name, tmp_path)
    packed, truth = (load_model(f, device="cpu", dtype=dtype) for f in folders)
    ids = draw_ids(truth, 20)
    with torch.no_grad():
        got, expected = packed(ids).logits, truth(ids).logits
    assert got.dtype == packed.dtype
    if dtype == "bfloat16":
        assert (got - expected).abs().max() < 0.05 * expected.abs().max()
    else:  # the plain twin holds fp32 products
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
