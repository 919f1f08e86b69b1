"""Causal depthwise convolution in torch: one shifted multiply per tap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See the contract in ``qnext.kernels.causal_conv``."""
    taps = weight.shape[1]
    lengths = cu_seqlens.diff()
    num, width = len(lengths), taps - 1
    if initial is None:
        initial = x.new_zeros(num, x.shape[1], width)
    if num == 1:
        window = torch.cat([initial[0].to(x.dtype).t(), x])  # (K-1+T, C)
        y = _taps(window, weight, len(x))
        return F.silu(y), window[len(x) :].t().unsqueeze(0)

    # Rows of all sequences behind their own K-1 past columns, laid out one after the other.
    starts = cu_seqlens[:-1].long() + width * torch.arange(num, device=x.device)
    sequence = torch.repeat_interleave(
        torch.arange(num, device=x.device), lengths, output_size=len(x)
    )
    rows = torch.arange(len(x), device=x.device) + width * (sequence + 1)
    past = (starts[:, None] + torch.arange(width, device=x.device)).flatten()
    window = x.new_empty(len(x) + num * width, x.shape[1])
    window = window.index_copy(0, rows, x)
    window = window.index_copy(0, past, initial.to(x.dtype).transpose(1, 2).flatten(0, 1))
    y = _taps(window, weight, len(window) - width)
    ends = starts + lengths
    last = (ends[:, None] + torch.arange(width, device=x.device)).flatten()
    final = window[last].view(num, width, -1).transpose(1, 2)
    return F.silu(y[rows - width]), final


def _taps(window: Tensor, weight: Tensor, count: int) -> Tensor:
    """Sum over taps j of weight[:, j] * window[i + j], for the first ``count`` rows i."""
    taps = weight.t().contiguous()
    y = window[:count] * taps[0]
    for j in range(1, len(taps)):
        y = torch.addcmul(y, window[j : j + count], taps[j])
    return y
