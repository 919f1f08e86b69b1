"""Row orders of spec 4.1 by indexed weights, and every rule inverted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import HYBRID

from qnext.checkpoint.save import gather
from qnext.config import ModelConfig
from qnext.weights import DiskTensor, disk_tensors


def interleaved(name: str, **changes: Any) -> tuple[ModelConfig, DiskTensor]:
    config = ModelConfig.from_dict({**HYBRID, "hidden_size": 1, **changes})
    disk = f"model.layers.0.linear_attn.{name}.weight"
    return config, next(t for t in disk_tensors(config) if t.name == disk)


def scatter(tensor: DiskTensor, shapes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Load a disk tensor whose every row holds its own number."""
    disk = torch.arange(tensor.shape[0], dtype=torch.float64)[:, None]
    params = {
        f"model.layers.0.linear_attn.{name}.weight": torch.full((rows, 1), -1.0).double()
        for name, rows in shapes.items()
    }
    for part in tensor.parts:
        part.put(params[part.param]).copy_(part.take(disk))
    assert torch.equal(gather(tensor, params, None), disk)
    return {name.split(".")[-2]: p[:, 0] for name, p in params.items()}


SIZES = [(16, 2, 128, 128), (3, 1, 4, 6), (2, 3, 5, 4), (1, 4, 8, 8)]


@pytest.mark.parametrize(("hk", "r", "dk", "dv"), SIZES)
def test_rows_of_in_proj_qkvz(hk: int, r: int, dk: int, dv: int) -> None:
    _, tensor = interleaved(
        "in_proj_qkvz", linear_num_key_heads=hk, linear_num_value_heads=hk * r,
        linear_key_head_dim=dk, linear_value_head_dim=dv,
    )  # fmt: skip
    key, value, group = hk * dk, hk * r * dv, 2 * dk + 2 * r * dv
    rows = scatter(tensor, {"in_proj_qkv": 2 * key + value, "in_proj_z": value})
    q = [group * h + d for h in range(hk) for d in range(dk)]
    k = [group * h + dk + d for h in range(hk) for d in range(dk)]
    heads = [(h, d) for h in range(hk * r) for d in range(dv)]
    v = [group * (h // r) + 2 * dk + dv * (h % r) + d for h, d in heads]
    z = [group * (h // r) + 2 * dk + r * dv + dv * (h % r) + d for h, d in heads]
    assert rows["in_proj_qkv"].tolist() == q + k + v
    assert rows["in_proj_z"].tolist() == z
    assert sorted(q + k + v + z) == list(range(hk * group))


@pytest.mark.parametrize(("hk", "r", "dk", "dv"), SIZES)
def test_rows_of_in_proj_ba(hk: int, r: int, dk: int, dv: int) -> None:
    _, tensor = interleaved("in_proj_ba", linear_num_key_heads=hk, linear_num_value_heads=hk * r)
    rows = scatter(tensor, {"in_proj_b": hk * r, "in_proj_a": hk * r})
    b = [2 * r * (h // r) + h % r for h in range(hk * r)]
    assert rows["in_proj_b"].tolist() == b
    assert rows["in_proj_a"].tolist() == [x + r for x in b]


def test_the_published_numbers() -> None:
    """Spec 4.1 as printed: groups of 768 and of 4."""
    sizes = {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
             "linear_value_head_dim": 128}  # fmt: skip
    rows = scatter(interleaved("in_proj_qkvz", **sizes)[1],
                   {"in_proj_qkv": 8192, "in_proj_z": 4096})  # fmt: skip
    h, d = 21, 77
    assert rows["in_proj_qkv"][4096 + 128 * h + d] == 768 * (h // 2) + 256 + 128 * (h % 2) + d
    assert rows["in_proj_z"][128 * h + d] == 768 * (h // 2) + 512 + 128 * (h % 2) + d
    gates = scatter(interleaved("in_proj_ba", **sizes)[1], {"in_proj_b": 32, "in_proj_a": 32})
    assert gates["in_proj_b"][h] == 4 * (h // 2) + h % 2
    assert gates["in_proj_a"][h] == 4 * (h // 2) + 2 + h % 2


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_moe"])
def test_every_parameter_is_covered_exactly_once(kind: str, fused: bool) -> None:
    config = ModelConfig.from_dict({**HYBRID, "model_type": kind})
    from qnext.checkpoint import build_model

    params = {n: torch.zeros_like(p) for n, p in build_model(config).named_parameters()}
    for tensor in disk_tensors(config, fused_experts=fused):
        for part in tensor.parts:
            assert part.put(params[part.param]).shape == part.take(torch.zeros(tensor.shape)).shape
            part.put(params[part.param]).add_(1)
    for name, count in params.items():
        assert (count == 1).all(), name
