"""Partial rotary position embedding and its frequencies (spec sections 3.4 and 7).

Half-split pairing inside the first ``2 * len(inv_freq)`` channels of a head: channel j pairs
with j + len(inv_freq); the other channels pass through.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_rotary"]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first channels of every head.

    Args:
        x: (T, H, D).
        cos: (T, R) cosines in the dtype of x, R half the rotary width.
        sin: (T, R) sines.

    Returns:
        (T, H, D) in the dtype of x.
    """
    half = cos.shape[1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)
