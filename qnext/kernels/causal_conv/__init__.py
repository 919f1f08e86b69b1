"""Causal depthwise convolution with SiLU over packed sequences (spec section 4.2).

``y_t = silu(sum_j w[:, j] * x_{t-K+1+j})`` with K taps; tap K-1 multiplies the current token.
Columns before the start of a sequence come from ``initial``, zero if absent.
"""

from __future__ import annotations

from torch import Tensor

from qnext.kernels.causal_conv import reference
from qnext.kernels.select import use_loops, use_triton

__all__ = ["causal_conv"]


def causal_conv(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve every packed sequence on its own and apply SiLU.

    Args:
        x: (T, C) inputs, sequences one after the other.
        weight: (C, K) taps.
        cu_seqlens: (N + 1,) int32 starts and end of the sequences.
        initial: (N, C, K - 1) the last inputs before each sequence, or None for zeros.

    Returns:
        ``(y, final)``: y (T, C) in the dtype of x, final (N, C, K - 1) the last K - 1 inputs
        (before convolution), which continue the sequences later.
    """
    if use_triton(x):
        from qnext.kernels.causal_conv.triton import causal_conv as on_gpu

        return on_gpu(x, weight, cu_seqlens, initial)
    if use_loops(x, weight):
        from qnext.kernels.causal_conv.loops import causal_conv as in_loops

        return in_loops(x, weight, cu_seqlens, initial)
    return reference.causal_conv(x, weight, cu_seqlens, initial)
