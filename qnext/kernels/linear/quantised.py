"""FP8 activations and block-scaled FP8 products for many rows (prefill).

An activation row is cut into groups of 128 numbers; each group has one fp32 scale, its largest
magnitude over 448. Scales are stored group by group, (K / 128, T): that is the order in which both
cuBLAS and the grouped kernels of ``qnext.kernels.experts`` read them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnext.errors import KernelError
from qnext.kernels.linear.reference import dequantise

GROUP = 128
"""Numbers of a row that share one scale."""
LARGEST = 448.0
"""Largest finite e4m3 number."""
LEAST = 1e-10
"""Floor of a group's magnitude, so that a group of zeros has a scale."""


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """(T, K) -> e4m3 (T, K) and fp32 scales (K / 128, T); the formula of the fused kernels."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    scales = groups.abs().amax(-1).clamp_min(LEAST) / LARGEST
    quantised = (groups * (1.0 / scales).unsqueeze(-1)).flatten(-2).to(torch.float8_e4m3fn)
    return quantised, scales.t().contiguous()


def restore(quantised: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that (T, K) e4m3 and their (K / 128, T) scales stand for."""
    groups = quantised.to(dtype).unflatten(-1, (-1, GROUP))
    return (groups * scales.t().to(dtype).unsqueeze(-1)).flatten(-2)


def fp8_linear(
    x: Tensor, scales: Tensor, weight: Tensor, scale_inv: Tensor, dtype: torch.dtype
) -> Tensor:
    """``x @ weight.T`` of FP8 numbers with their scales.

    cuBLAS's block-scaled product through ``torch._scaled_mm``: 1,192 TFLOP/s measured on an H200,
    where BF16 reaches 770.

    Args:
        x: (T, K) e4m3; on the GPU T is a multiple of 4.
        scales: (K / 128, T) fp32, see ``quantise``.
        weight: (N, K) e4m3.
        scale_inv: (N / 128, K / 128) fp32.
        dtype: of the result.

    Returns:
        (T, N); accumulation is fp32.

    Raises:
        KernelError: sizes that are not whole blocks.
    """
    if weight.shape[0] % GROUP or weight.shape[1] % GROUP or x.shape[1] != weight.shape[1]:
        raise KernelError(
            f"fp8_linear: x {tuple(x.shape)}, weight {tuple(weight.shape)}",
            hint="both sides of the weight must be multiples of 128, and the widths equal",
        )
    if x.is_cuda:
        return torch._scaled_mm(
            x, weight.t(), scale_a=scales.t(), scale_b=scale_inv.t(), out_dtype=dtype
        )
    wide = restore(x, scales) @ dequantise(weight, scale_inv, torch.float32).T
    return wide.to(dtype)
