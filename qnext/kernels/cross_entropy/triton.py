"""Cross-entropy and its slope in Triton: a program owns a row and writes the slope over it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Most columns in flight.
COLUMNS = 8192


@triton.jit
def _row(logits, labels, losses, scale, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    base = logits + row * V
    c = tl.arange(0, BLOCK)
    top = float("-inf")
    total = 0.0
    picked = 0.0
    for start in range(0, V, BLOCK):
        x = tl.load(base + start + c, mask=start + c < V, other=float("-inf")).to(tl.float32)
        high = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - high) + tl.sum(tl.exp(x - high), 0)
        # Picked from the tile, not loaded: other threads overwrite the row below.
        picked += tl.sum(tl.where(start + c == label, x, 0.0), 0)
        top = high
    rest = tl.log(total)  # kept apart from the maximum, which may be large
    valid = label >= 0
    tl.store(losses + row, tl.where(valid, rest - (picked - top), 0.0))
    factor = tl.where(valid, scale, 0.0)
    for start in range(0, V, BLOCK):
        x = tl.load(base + start + c, mask=start + c < V, other=float("-inf")).to(tl.float32)
        slope = (tl.exp(x - top - rest) - tl.where(start + c == label, 1.0, 0.0)) * factor
        tl.store(base + start + c, slope.to(logits.dtype.element_ty), mask=start + c < V)


def cross_entropy(logits: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See the contract in ``qnext.kernels.cross_entropy``; the slopes take the logits' place."""
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(triton.next_power_of_2(columns), COLUMNS)
    if rows:
        _row[(rows,)](logits, labels, losses, scale, columns, BLOCK=block, num_warps=8)
    return losses, logits
