"""qnext quantize, and the verbs that read what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qnext.checkpoint import load_model
from qnext.checkpoint.texts import fixed_text
from qnext.quant.surgery import matrices


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, Path]:
    """The shipped model in both formats, and their reports."""
    from typer.testing import CliRunner

    from qnext.cli import app

    folders = {}
    for format in ("fp8", "int4"):
        folders[format] = tmp_path_factory.mktemp(format) / "small"
        source = str(repository / "qnext/assets/qnext-small")
        command = ["quantize", source, str(folders[format]), "--format", format]
        command += ["--group-size", "32", "--json", "--device", "cpu"]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["prediction"]["tokens"] > 3000
    return folders


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "quantization_report.json").read_text())


# KL in nats a token against BF16; share of the weights' bytes; see docs/quantization.md.
BOUNDS = {"fp8": (0.006, 0.05, 0.58), "int4": (0.045, 0.25, 0.41)}


@pytest.mark.parametrize("format", BOUNDS)
def test_the_shipped_model_loses_little(format: str, packed: dict[str, Path]) -> None:
    kl, p99, size = BOUNDS[format]
    found = report(packed[format])
    prediction, draft = found["prediction"], found["draft"]
    assert 0 < prediction["kl_mean"] < kl
    assert prediction["kl_p99"] < p99
    assert prediction["same_top1"] > (0.94 if format == "fp8" else 0.85)
    assert prediction["perplexity_quantized"] < 1.02 * prediction["perplexity"]
    assert draft["kl_mean"] < kl
    assert found["bytes_quantized"] < size * found["bytes_plain"]
    assert len(found["layers"]) == 12
    text = (packed[format] / "quantization_report.md").read_text()
    assert f"{prediction['kl_mean']:.5f}" in text
    assert "| model.layers.11 |" in text


@pytest.mark.parametrize("format", BOUNDS)
def test_generate_and_inspect(format: str, packed: dict[str, Path], qnext: Any) -> None:
    folder = str(packed[format])
    text = qnext("generate", "The file system is", "-m", folder, "--max-tokens", "6", "-k", "1",
               "--temperature", "0", "--device", "cpu").out  # fmt: skip
    assert len(text.strip()) > 5
    facts = json.loads(qnext("inspect", folder, "--json").out)
    assert facts["quantization"].startswith(
        {"fp8": "fp8: fp8 128x128", "int4": "compressed"}[format]
    )
    assert 0.7 < facts["quantized_parameters"] / facts["parameters"] < 1.1
    assert "all there" in facts["weights"]
    assert "quantised" in qnext("inspect", folder).out


def test_convert_dequantises(packed: dict[str, Path], tmp_path: Path, qnext: Any) -> None:
    target = tmp_path / "plain"
    assert not qnext("convert", str(packed["fp8"]), str(target), "--dtype", "float32").code
    plain, quantised = load_model(target), load_model(packed["fp8"], dtype="float32")
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    found = matrices(quantised)
    assert len(found) > 100
    for name, matrix in found.items():
        weight = plain.get_parameter(name)
        assert torch.equal(matrix.dequantise(torch.float32), weight), name


def test_a_target_with_something_in_it(packed: dict[str, Path], qnext: Any) -> None:
    done = qnext("quantize", str(packed["int4"]), str(packed["fp8"]))
    assert done.code == 2
    assert "is not empty" in done.err


def test_the_texts_are_different_and_in_several_documents() -> None:
    one, two = fixed_text("calibration"), fixed_text("evaluation")
    assert min(len(one), len(two)) >= 5
    assert not set(one) & set(two)
    assert all(document.strip() for document in one + two)


def test_inspect_of_a_fetched_index(qnext: Any, tmp_path: Path) -> None:
    """Names alone, as a hub id gives them: every scale of the 80B's FP8 twin, with MTP."""
    from test_checkpoints import PUBLISHED_80B

    from qnext.config import ModelConfig
    from qnext.quant.plan import QuantizePlan
    from qnext.weights import disk_tensors

    rules = list(disk_tensors(ModelConfig.from_dict({**PUBLISHED_80B,
                                                     "num_nextn_predict_layers": 1})))  # fmt: skip
    plan = QuantizePlan.make(rules, "fp8", 128)
    config = {**PUBLISHED_80B, "quantization_config": plan.config()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = {rule.name: "model-00001-of-00008.safetensors" for rule in rules}
    names |= {f"{stem}.weight_scale_inv": "model-00001-of-00008.safetensors"
              for stem in plan.schemes}  # fmt: skip
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    facts = json.loads(qnext("inspect", tmp_path, "--json").out)
    assert facts["tensors"] == 151_479
    assert facts["weights"] == "as the index names them"
    assert facts["quantization"] == "fp8: fp8 128x128 blocks"
    del names["mtp.layers.0.mlp.experts.7.up_proj.weight_scale_inv"]
    index.write_text(json.dumps({"weight_map": names}))
    done = qnext("inspect", tmp_path)
    assert done.code == 1
    assert "mtp.layers.0.mlp.experts.7.up_proj" in done.err
