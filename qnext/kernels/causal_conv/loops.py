"""The short convolution on a CPU in a compiled loop (numba): prefill without gradients."""

from __future__ import annotations

from typing import Any

import numba
import torch
from torch import Tensor

from qnext.kernels.small_batch.loops import MATHS, sigmoid

Array = Any


@numba.njit(cache=True, fastmath=MATHS, nogil=True, error_model="numpy")
def _rows(x: Array, taps: Array, bounds: Array, window: Array, out: Array) -> None:
    """``window`` (N, K - 1, C) holds the inputs before each sequence and gets its last ones."""
    width = taps.shape[0] - 1
    for n in range(len(bounds) - 1):
        begin = bounds[n]
        for t in range(begin, bounds[n + 1]):
            o, fresh, tap = out[t], x[t], taps[width]
            for c in range(len(o)):
                o[c] = tap[c] * fresh[c]
            for back in range(1, width + 1):
                tap = taps[width - back]
                old = x[t - back] if t - back >= begin else window[n, width + t - back - begin]
                for c in range(len(o)):
                    o[c] += tap[c] * old[c]
            for c in range(len(o)):
                o[c] *= sigmoid(o[c])
        # The last K - 1 of (window, inputs), oldest first: a row is read before it is written.
        count = bounds[n + 1] - begin
        for j in range(width):
            at = count + j - width
            window[n, j] = x[begin + at] if at >= 0 else window[n, width + at]


def causal_conv(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See the contract in ``qnext.kernels.causal_conv``; fp32 on a CPU, no gradients."""
    shape = (len(cu_seqlens) - 1, weight.shape[1] - 1, x.shape[1])
    window = torch.zeros(shape)
    if initial is not None:
        window.copy_(initial.transpose(1, 2))
    out = torch.empty(x.shape)
    _rows(
        x.contiguous().numpy(), weight.t().contiguous().numpy(), cu_seqlens.numpy(),
        window.numpy(), out.numpy(),
    )  # fmt: skip
    return out, window.transpose(1, 2)
