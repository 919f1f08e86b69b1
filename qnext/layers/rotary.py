"""Rotary frequencies, plain or stretched by YaRN (arXiv 2309.00071; spec section 7)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qnext.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """The (R,) fp32 inverse frequencies, and the factor on cos and sin (1 without YaRN)."""
    dim = config.rotary_dim
    theta = config.rope_theta
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    yarn = config.rope_scaling
    if yarn is None:
        return plain, 1.0
    length = yarn.original_max_position_embeddings

    def rotations(count: float) -> float:
        """The channel that turns ``count`` times over the original length."""
        return dim * math.log(length / (count * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(rotations(yarn.beta_fast)), 0)
    high = min(math.ceil(rotations(yarn.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    ramp = ramp.clamp(0, 1)
    factor = yarn.attention_factor
    if factor is None:
        factor = 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
    return plain * (1 - ramp) + plain / yarn.factor * ramp, factor


class RotaryEmbedding(nn.Module):
    """Cosines and sines for the positions of a batch, computed once per step."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inv_freq, self.factor = inverse_frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(T,) positions -> cos, sin (T, R) in ``dtype``; the angles are fp32."""
        angles = positions.float().unsqueeze(1) * self.inv_freq
        return (angles.cos() * self.factor).to(dtype), (angles.sin() * self.factor).to(dtype)
