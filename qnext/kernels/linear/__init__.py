"""Linear with few rows: BF16 or block-FP8 weights, norm before and residual after.

The op of decoding: reading the weight is all the time it takes, so the zero-centred RMSNorm of
its input and the residual add of its output ride along for nothing. Many rows (prefill) belong
to ``torch`` matrix products, not here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnext.errors import KernelError
from qnext.kernels.linear import reference
from qnext.kernels.select import use_triton

__all__ = ["MAX_ROWS", "linear"]

MAX_ROWS = 16
"""Rows (tokens) up to which the Triton kernels are meant; more rows take the reference."""


def linear(
    x: Tensor,
    weight: Tensor,
    scale_inv: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
) -> Tensor:
    """``residual + norm(x) @ dequantised(weight).T``.

    Args:
        x: (T, K) activations, BF16 on the GPU.
        weight: (N, K), BF16 (then ``scale_inv`` is None) or float8_e4m3fn.
        scale_inv: (ceil(N/128), ceil(K/128)) scales of the 128x128 blocks; the weight is
            multiplied by them (spec section 8.1).
        norm_weight: (K,) zero-centred RMSNorm weight applied to ``x`` first (spec 2.1).
        eps: of that norm.
        residual: (T, N) added to the output.

    Returns:
        (T, N) in the dtype of ``x``; accumulation is fp32.

    Raises:
        KernelError: shapes that do not fit, or FP8 without scales.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise KernelError(
            f"linear: x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}",
            hint="pass x as (tokens, in) and weight as (out, in)",
        )
    if (weight.dtype == torch.float8_e4m3fn) != (scale_inv is not None):
        raise KernelError(
            f"linear: weight is {weight.dtype}, scales are "
            f"{'missing' if scale_inv is None else 'given'}",
            hint="FP8 weights need weight_scale_inv, other dtypes must not have it",
        )
    if use_triton(x) and x.shape[0] <= MAX_ROWS:
        from qnext.kernels.linear import triton

        if triton.covers(weight):
            return triton.linear(
                x, weight, scale_inv, norm_weight=norm_weight, eps=eps, residual=residual
            )
    return reference.linear(
        x, weight, scale_inv, norm_weight=norm_weight, eps=eps, residual=residual
    )
