"""Torch reference of the linear op: dequantise, normalise, multiply, add."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
"""Edge of the square block of weights that shares one FP8 scale (spec section 8.1)."""


def dequantise(weight: Tensor, scale_inv: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weight (N, K) as ``dtype``; block ``[i//128, j//128]`` is multiplied by its scale."""
    if scale_inv is None:
        return weight.to(dtype)
    rows, columns = weight.shape
    scale = scale_inv.float().repeat_interleave(BLOCK, 0)[:rows]
    scale = scale.repeat_interleave(BLOCK, 1)[:, :columns]
    return (weight.float() * scale).to(dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    scale_inv: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
) -> Tensor:
    """See ``qnext.kernels.linear.linear``; matrix product in the dtype of ``x``."""
    if norm_weight is not None:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        x = (wide * (1.0 + norm_weight.float())).to(x.dtype)
    out = x @ dequantise(weight, scale_inv, x.dtype).T
    return out if residual is None else residual + out
