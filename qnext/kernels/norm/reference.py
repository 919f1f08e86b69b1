"""RMS norms in torch: fp32 inside, rounded where the checkpoint's authors round."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zero-centred RMSNorm; see the contract in ``qnext.kernels.norm``."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight.float() + 1.0, eps)
    x32 = x.float()
    return F.rms_norm(x32, (x.shape[-1],), weight.float() + 1.0, eps).to(x.dtype)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gated RMSNorm; see the contract in ``qnext.kernels.norm``."""
    normed = F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype)
    return (weight.to(x.dtype) * normed * F.silu(z.float())).to(x.dtype)
