"""RMS norms in torch: fp32 inside (fp64 for fp64), rounded where the checkpoint's authors round."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zero-centred RMSNorm; see the contract in ``qnext.kernels.norm``."""
    wide = _wide(x)
    return F.rms_norm(wide, (x.shape[-1],), weight.to(wide.dtype) + 1.0, eps).to(x.dtype)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gated RMSNorm; see the contract in ``qnext.kernels.norm``."""
    normed = F.rms_norm(_wide(x), (x.shape[-1],), None, eps).to(x.dtype)
    return (weight.to(x.dtype) * normed * F.silu(_wide(z))).to(x.dtype)
