"""The numbers of spec section 7."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import HYBRID

from qnext.config import ModelConfig
from qnext.layers.rotary import RotaryEmbedding, inverse_frequencies


def frequencies(theta: float, factor: float | None) -> tuple[torch.Tensor, float]:
    changes: dict[str, Any] = {"head_dim": 256, "rope_theta": theta}
    if factor is not None:
        changes["rope_scaling"] = {"rope_type": "yarn", "factor": factor,
                                   "original_max_position_embeddings": 262144}  # fmt: skip
    return inverse_frequencies(ModelConfig.from_dict({**HYBRID, **changes}))


def test_plain() -> None:
    found, factor = frequencies(1e7, None)
    expected = torch.tensor([1e7 ** (-2 * j / 64) for j in range(32)], dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert factor == 1


def test_published_values_at_theta_1e7_and_factor_4() -> None:
    found, factor = frequencies(1e7, 4.0)
    assert factor == pytest.approx(1.138629, abs=1e-6)
    values = {14: 8.659643e-04, 15: 4.742398e-04, 18: 7.217387e-05, 21: 8.759770e-06,
              31: 4.137043e-08}  # fmt: skip
    for j, value in values.items():
        assert found[j].item() == pytest.approx(value, rel=1e-6)
    assert frequencies(1e7, 2.0)[1] == pytest.approx(1.069315, abs=1e-6)


@pytest.mark.parametrize(("theta", "low", "high"), [(1e7, 14, 22), (5e6, 14, 23)])
@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_the_ramp(theta: float, low: int, high: int, factor: float) -> None:
    ratio = frequencies(theta, factor)[0] / frequencies(theta, None)[0]
    torch.testing.assert_close(ratio[: low + 1], torch.ones(low + 1))
    torch.testing.assert_close(ratio[high:], torch.full((32 - high,), 1 / factor))
    between = ratio[low : high + 1]
    steps = (1 - between) / (1 - 1 / factor) * (high - low)
    torch.testing.assert_close(steps, torch.arange(high - low + 1.0), atol=1e-4, rtol=0)


def test_the_attention_factor_multiplies_cos_and_sin() -> None:
    config = {**HYBRID, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                                         "original_max_position_embeddings": 64}}  # fmt: skip
    rotary = RotaryEmbedding(ModelConfig.from_dict(config))
    cos, sin = rotary(torch.arange(100), torch.float32)
    norm = (cos.square() + sin.square()).sqrt()
    torch.testing.assert_close(norm, torch.full_like(norm, 1.1386294), rtol=1e-5, atol=0)


def test_far_positions_have_exact_angles() -> None:
    rotary = RotaryEmbedding(ModelConfig.from_dict({**HYBRID, "head_dim": 256, "rope_theta": 1e7}))
    cos, _ = rotary(torch.tensor([262143]), torch.float32)
    angle = torch.tensor(262143.0) * rotary.inv_freq
    torch.testing.assert_close(cos[0].double(), angle.double().cos(), rtol=0, atol=1e-6)


def test_a_ramp_that_ends_beyond_the_last_channel() -> None:
    """At theta 1e4, dim(32) = 24.9 and dim(1) = 36.98 of 32 channels: cut at 63, not at 31."""
    ratio = frequencies(1e4, 4.0)[0] / frequencies(1e4, None)[0]
    ramp = (torch.arange(24.0, 32.0) - 24) / (37 - 24)
    torch.testing.assert_close(ratio[24:], 1 - 0.75 * ramp)
