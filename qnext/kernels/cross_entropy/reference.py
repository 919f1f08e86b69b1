"""Cross-entropy and its slope in torch."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See the contract in ``qnext.kernels.cross_entropy``."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    valid = (labels >= 0).to(wide)
    index = labels.clamp(min=0).unsqueeze(1)
    log_probs = logits.log_softmax(1, dtype=wide)
    losses = -log_probs.gather(1, index).squeeze(1) * valid
    slope = log_probs.exp_()
    slope.scatter_add_(1, index, slope.new_full((1, 1), -1.0).expand_as(index))
    return losses, slope.mul_((valid * scale).unsqueeze(1)).to(logits.dtype)
