"""Matrix products with packed weights: block-scaled FP8 and group-scaled INT4.

Weight-only: activations stay as they are, and the weight is what its format says it is
(``weights``); products accumulate as in the plain ops. A kernel that also quantises activations,
as the official FP8 recipe allows, is an approximation of this contract.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnext.errors import KernelError
from qnext.kernels.scaled_matmul import reference
from qnext.kernels.scaled_matmul.weights import AnyWeight, Fp8Weight, Int4Weight, PackedWeight

__all__ = [
    "AnyWeight", "Fp8Weight", "Int4Weight", "PackedWeight", "dequantise", "scaled_experts",
    "scaled_linear",
]  # fmt: skip


def dequantise(weight: AnyWeight, dtype: torch.dtype) -> Tensor:
    """The matrix in a floating dtype: fp32 inside (fp64 for fp64), rounded once.

    Args:
        weight: packed, or a plain tensor, which is only cast.
        dtype: of the result.

    Returns:
        The matrix, (..., N, K).
    """
    return reference.dequantise(weight, dtype)


def scaled_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ dequantised(weight).T + bias``.

    Args:
        x: (T, K) activations.
        weight: (N, K) packed.
        bias: (N,) or None.

    Returns:
        (T, N) in the dtype of ``x``.

    Raises:
        KernelError: shapes that do not fit.
    """
    if x.ndim != 2 or len(weight.shape) != 2 or x.shape[1] != weight.shape[1]:
        raise KernelError(
            f"scaled_linear: x {tuple(x.shape)} does not fit weight {weight.shape}",
            hint="pass x as (tokens, in) and weight as (out, in)",
        )
    return reference.scaled_linear(x, weight, bias)


def scaled_experts(
    x: Tensor, gate_up_proj: AnyWeight, down_proj: AnyWeight, ids: Tensor, weights: Tensor
) -> Tensor:
    """``qnext.kernels.experts.experts`` with packed matrices; either may be plain.

    Args:
        x: (T, H) inputs.
        gate_up_proj: (E, 2I, H), the gate rows first.
        down_proj: (E, H, I).
        ids: (T, k) int64 chosen experts.
        weights: (T, k) routing weights.

    Returns:
        (T, H) in the dtype of x. Only experts that were chosen are dequantised.

    Raises:
        KernelError: expert matrices that do not fit x.
    """
    num, double, hidden = gate_up_proj.shape
    if hidden != x.shape[1] or tuple(down_proj.shape) != (num, hidden, double // 2):
        raise KernelError(
            f"scaled_experts: x {tuple(x.shape)}, gate_up_proj {tuple(gate_up_proj.shape)}, "
            f"down_proj {tuple(down_proj.shape)} do not belong together"
        )
    return reference.scaled_experts(x, gate_up_proj, down_proj, ids, weights)
