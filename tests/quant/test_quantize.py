"""qnext quantize: what it writes, what it keeps, and that it loses little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_folders import EVEN, FAMILIES
from tiny import draw_ids, tiny_model

from qnext.checkpoint import load_model, save_model
from qnext.checkpoint.compare import compare
from qnext.checkpoint.quantize import Importance, quantize
from qnext.checkpoint.reader import SafetensorsFolder
from qnext.errors import CheckpointError, ConfigError
from qnext.quant.fp8 import Fp8Scheme
from qnext.quant.int4 import Int4Scheme, group_scales, quantise_groups
from qnext.quant.names import NameList
from qnext.quant.plan import QuantizePlan
from qnext.quant.surgery import matrices
from qnext.weights import disk_tensors


def plain_folder(tmp_path: Path, family: str = "qwen3_next", **changes: Any) -> Path:
    merged = {**EVEN, **FAMILIES[family], **changes}
    merged = {k: v for k, v in merged.items() if v is not None or k == "layer_types"}
    save_model(tiny_model(torch.bfloat16, **merged), tmp_path / "plain")
    return tmp_path / "plain"


def random_documents(folder: Path, count: int = 3) -> list[torch.Tensor]:
    model = load_model(folder, device="cpu")
    return [draw_ids(model, 90, seed) for seed in range(count)]


@pytest.mark.parametrize("format", ["fp8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_quantises_and_loads(family: str, format: str, tmp_path: Path) -> None:
    source, target = plain_folder(tmp_path, family), tmp_path / "packed"
    documents = random_documents(source)
    plan = quantize(source, target, format=format, group_size=32, documents=documents)
    model, plain = load_model(target, device="cpu"), load_model(source, device="cpu")
    assert len(matrices(model)) >= 20
    assert plan.schemes
    names = SafetensorsFolder(target).entries
    for stem in plan.kept:
        assert stem in names or f"{stem}.weight" in names
    for name, p in model.named_parameters():
        if name in dict(plain.named_parameters()):
            assert torch.equal(p, plain.get_parameter(name)), name
    found = compare(source, target, documents, nbytes=1000)
    assert 0 < found.prediction.kl_mean < (0.05 if format == "fp8" else 0.6)
    assert found.prediction.tokens == 3 * 89
    assert len(found.layers) == 4
    assert all(0 < e.own < (0.12 if format == "fp8" else 0.5) for e in found.layers)


def test_a_folder_against_itself_differs_in_nothing(tmp_path: Path) -> None:
    source = plain_folder(tmp_path)
    found = compare(source, source, random_documents(source), nbytes=1000)
    assert found.prediction.kl_max == 0
    assert found.prediction.same_top1 == 1
    assert found.prediction.perplexity == found.prediction.perplexity_quantized
    assert found.draft is not None
    assert found.draft.kl_max == 0
    assert all(e.own == 0 == e.carried for e in found.layers)


def test_the_measure_is_that_of_the_whole_models(tmp_path: Path) -> None:
    """Layer by layer gives what two whole models give."""
    source, target = plain_folder(tmp_path), tmp_path / "packed"
    documents = random_documents(source, 1)
    quantize(source, target, format="int4", group_size=32)
    found = compare(source, target, documents, nbytes=1000).prediction
    with torch.no_grad():
        p, q = (
            load_model(f, dtype="float32", device="cpu")(documents[0]).logits.log_softmax(-1)[:-1]
            for f in (source, target)
        )
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.kl_max == pytest.approx(float(kl.max()), rel=1e-3)
    loss = -q.gather(1, documents[0][1:, None]).mean()
    assert found.perplexity_quantized == pytest.approx(float(loss.exp()), rel=1e-4)
    assert found.bits_per_byte_quantized == pytest.approx(
        float(loss) * 89 / 1000 / 0.6931471805599453, rel=1e-4
    )


def test_the_official_list_of_unconverted_modules() -> None:
    """Spec 8.1: what the FP8 twins of the 80B leave in BF16, name by name."""
    from tiny import HYBRID

    from qnext.config import ModelConfig

    config = ModelConfig.from_dict({**HYBRID, "mlp_only_layers": [], "layer_types": None})
    plan = QuantizePlan.make(disk_tensors(config), "fp8", 128)
    expected = {"lm_head", "mtp.fc", "mtp.norm", "mtp.pre_fc_norm_embedding",
                "mtp.pre_fc_norm_hidden"}  # fmt: skip
    for layer in [*(f"model.layers.{i}" for i in range(4)), "mtp.layers.0"]:
        names = ["input_layernorm", "post_attention_layernorm", "mlp.gate",
                 "mlp.shared_expert_gate"]  # fmt: skip
        if layer in ("model.layers.3", "mtp.layers.0"):
            names += ["self_attn.q_norm", "self_attn.k_norm"]
        else:
            names += [f"linear_attn.{x}" for x in ("A_log", "conv1d", "dt_bias", "in_proj_ba",
                                                   "norm")]  # fmt: skip
        expected |= {f"{layer}.{name}" for name in names}
    assert set(plan.kept) == expected
    assert plan.config()["modules_to_not_convert"] == list(plan.kept)
    assert "model.layers.0.linear_attn.in_proj_qkvz" in plan.schemes
    assert "mtp.layers.0.mlp.experts.5.down_proj" in plan.schemes


def test_ignored_modules_stay_plain(tmp_path: Path) -> None:
    source, target = plain_folder(tmp_path), tmp_path / "packed"
    kept = ("mtp", "model.layers.0.linear_attn", "re:.*shared_expert[.]down_proj")
    quantize(source, target, format="int4", group_size=32, ignore=kept)
    model = load_model(target, device="cpu")
    names = set(matrices(model))
    assert not any(n.startswith(("mtp.", "model.layers.0.linear_attn")) for n in names)
    assert not any("shared_expert.down_proj" in n for n in names)
    assert "model.layers.2.linear_attn.in_proj_qkv.weight" in names
    with pytest.raises(ConfigError, match=r"self_atn: the model has no such module"):
        quantize(source, tmp_path / "c", format="fp8", ignore=("self_atn",))


def test_groups_that_do_not_divide_get_a_group_of_their_own(tmp_path: Path) -> None:
    source, target = plain_folder(tmp_path, moe_intermediate_size=24), tmp_path / "packed"
    quantize(source, target, format="int4", group_size=32)
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear"]
    [small] = [g for g in groups.values() if g["weights"]["group_size"] == 8]
    assert "model.layers.1.mlp.experts.3.down_proj" in NameList(small["targets"], "targets")
    assert "model.layers.1.mlp.experts.3.up_proj" not in NameList(small["targets"], "targets")
    assert load_model(target).model.layers[0].mlp.experts.down_proj.group_size == 8


def test_shards_and_what_lies_beside_the_weights(tmp_path: Path) -> None:
    source, target = plain_folder(tmp_path), tmp_path / "packed"
    (source / "tokenizer.json").write_text("{}")
    quantize(source, target, format="fp8", max_shard_size=30_000)
    files = SafetensorsFolder(target)
    assert len(files.files) > 3
    assert (target / "tokenizer.json").exists()
    assert not list(target.glob("*.unfinished"))
    load_model(target)


@pytest.mark.parametrize(
    ("how", "words"),
    [({"format": "nf4"}, "nf4"), ({"format": "int4", "group_size": 64}, "group size 64"),
     ({"format": "fp8", "ignore": ("re:.*",)}, "nothing is left")],
)  # fmt: skip
def test_options_that_cannot_be(how: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = plain_folder(tmp_path)
    with pytest.raises(ConfigError, match=words):
        quantize(source, tmp_path / "packed", **how)
    assert not list((tmp_path / "packed").glob("*.safetensors"))


def test_a_quantised_source_is_refused(tmp_path: Path) -> None:
    source, target = plain_folder(tmp_path), tmp_path / "packed"
    quantize(source, target, format="fp8")
    with pytest.raises(ConfigError, match=r"quantised already \(fp8"):
        quantize(target, tmp_path / "again", format="fp8")


def test_nothing_is_left_behind_when_the_source_breaks(tmp_path: Path) -> None:
    source = plain_folder(tmp_path)
    file = source / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-2000:] = b"\xff" * 2000
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="NaN"):
        quantize(source, tmp_path / "packed", format="fp8", max_shard_size=10_000)
    assert list((tmp_path / "packed").iterdir()) == []


def test_fp8_rounds_to_the_nearest_of_its_block() -> None:
    weight = torch.randn(200, 150, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[:128, :128] *= 30
    weight[128:, 128:] = 0
    pieces = Fp8Scheme().encode(weight)
    values, scale = pieces[".weight"].float(), pieces[".weight_scale_inv"]
    assert scale.shape == (2, 2)
    assert scale[1, 1] == 1
    assert scale[0, 0] == weight[:128, :128].abs().max().float() / 448
    wide = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :150]
    error = (values * wide - weight.float()).abs()
    # Three bits behind the point: half a step is 1/16 of a power of two; subnormals 2^-10.
    assert (error <= weight.float().abs() / 16 + wide * 2**-10 + 1e-12).all()
    assert values.abs().max() == 448


def test_importance_chooses_scales_that_change_outputs_less() -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=rng)
    weight[:, ::16] *= 4  # large entries where the inputs are small
    x = torch.randn(500, 128, generator=rng)
    x[:, ::16] *= 0.05
    importance = x.square().mean(0)

    def output_error(scale: torch.Tensor) -> float:
        rounded = quantise_groups(weight, scale) * scale.unsqueeze(-1)
        return float((x @ (rounded.flatten(1) - weight).T).square().mean())

    usual, chosen = group_scales(weight, 32), group_scales(weight, 32, importance)
    assert (chosen <= usual).all()
    assert output_error(chosen) < 0.9 * output_error(usual)


def test_constant_and_zero_groups() -> None:
    weight = torch.zeros(2, 64).bfloat16()
    weight[1, :32] = -3
    for importance in (None, torch.ones(64)):
        scale = group_scales(weight, 32, importance)
        assert (scale > 0).all()
        back = (quantise_groups(weight.float(), scale.float()) * scale.float()[..., None]).flatten(
            1
        )
        assert (back[0] == 0).all()
        torch.testing.assert_close(back, weight.float(), atol=0.25, rtol=0)
    assert Int4Scheme(32).encode(weight)[".weight_scale"].dtype == torch.bfloat16


def test_importance_is_the_mean_square_of_what_comes_in(tmp_path: Path) -> None:
    from contextlib import ExitStack

    model = tiny_model(torch.float32, **EVEN)
    ids, seen = draw_ids(model, 300), Importance()
    inputs: dict[str, torch.Tensor] = {}
    layer = model.model.layers[0]
    layer.mlp.experts.register_forward_pre_hook(
        lambda m, args: inputs.update(x=args[0], ids=args[1])
    )
    with torch.no_grad(), ExitStack() as stack:
        seen.watch(model, stack)
        model(ids)
    x, chosen = inputs["x"], inputs["ids"]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert seen.experts[name].shape == (8, 32)
    expert = int(chosen.flatten().bincount().argmax())
    torch.testing.assert_close(
        seen.experts[name][expert], x[(chosen == expert).any(1)].square().mean(0)
    )
    torch.testing.assert_close(seen.linear["model.layers.0.mlp.gate.weight"], x.square().mean(0))
    before = dict(seen.linear)
    model(ids[:5])  # hooks are gone
    assert seen.linear.keys() == before.keys()
    assert all(seen.linear[n] is before[n] for n in before)
