"""RMS norms in torch: fp32 inside (fp64 for fp64), rounded where the checkpoint's authors round."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _normed(x: Tensor, eps: float) -> Tensor:
    # Written out: on a CPU F.rms_norm takes several times as long for a few rows.
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zero-centred RMSNorm; see the contract in ``qnext.kernels.norm``."""
    normed = _normed(_wide(x), eps)
    return torch.addcmul(normed, normed, weight.to(normed.dtype)).to(x.dtype)  # normed * (1 + w)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gated RMSNorm; see the contract in ``qnext.kernels.norm``."""
    normed = _normed(_wide(x), eps).to(x.dtype)
    return (weight.to(x.dtype) * normed * F.silu(_wide(z))).to(x.dtype)
