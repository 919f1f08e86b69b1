"""The two RMS norms as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qnext.kernels.norm import gated_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """RMSNorm; Qwen3-Next stores the weight as the distance from one ("zero-centred").

    Args:
        size: width of the last axis.
        eps: added to the mean square.
        zero_centred: False for Qwen3, whose weights are plain.
    """

    def __init__(self, size: int, eps: float, zero_centred: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centred = zero_centred
        self.weight = nn.Parameter(torch.zeros(size) if zero_centred else torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        # A plain weight minus one in fp32 is the same norm: one op serves both families.
        weight: Tensor = self.weight
        if not self.zero_centred:
            weight = (weight if weight.dtype == torch.float64 else weight.float()) - 1.0
        return rms_norm(x, weight, self.eps)


class GatedRMSNorm(nn.Module):
    """RMSNorm with a plain weight, gated by ``silu(z)``: the output norm of DeltaNet."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x, z (..., size) -> (..., size)."""
        return gated_rms_norm(x, z, self.weight, self.eps)
