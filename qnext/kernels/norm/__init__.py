"""RMS normalisations of Qwen3-Next (spec section 2).

``rms_norm``: zero-centred weight, ``y = round(x * rsqrt(mean(x^2) + eps) * (1 + w))``, one
rounding at the end. ``gated_rms_norm``: ordinary weight, normalise first, gate with
``silu(z)`` after; only the DeltaNet output uses it.
"""

from __future__ import annotations

from torch import Tensor

from qnext.kernels.norm import reference
from qnext.kernels.select import use_triton

__all__ = ["gated_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zero-centred RMSNorm over the last axis.

    Args:
        x: (..., D) in any float dtype.
        weight: (D,), stored as the distance from one.
        eps: added to the mean square.

    Returns:
        (..., D) in the dtype of ``x``; the interior is fp32.
    """
    if use_triton(x):
        from qnext.kernels.norm.triton import rms_norm as on_gpu

        return on_gpu(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis with a plain weight, then times ``silu(z)``.

    Args:
        x: (..., D) output of the delta rule.
        z: (..., D) gate.
        weight: (D,), multiplied as it is (not ``1 + w``).
        eps: added to the mean square.

    Returns:
        (..., D) in the dtype of ``x``; the norm and the SiLU are fp32.
    """
    if use_triton(x):
        from qnext.kernels.norm.triton import gated_rms_norm as on_gpu

        return on_gpu(x, z, weight, eps)
    return reference.gated_rms_norm(x, z, weight, eps)
