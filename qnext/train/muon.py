"""Muon for the hidden matrices (arXiv 2502.16982), stacked experts included.

The update is the momentum with all its singular values brought near one, by Newton-Schulz
iterations, times ``0.2 sqrt(max(rows, columns))``: then its size is that of AdamW's and both take
the same rate and decay. Matrices of one shape are iterated together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qnext.layers.delta_net import DepthwiseConv

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MIN_SIDE = 16


def wants_muon(model: nn.Module, name: str) -> bool:
    """Whether a parameter is a hidden matrix: no embedding, head, router, gate row or tap."""
    path, _, _ = name.rpartition(".")
    owner, shape = model.get_submodule(path), model.get_parameter(name).shape
    if isinstance(owner, nn.Embedding | DepthwiseConv) or path.endswith(("lm_head", "mlp.gate")):
        return False
    return len(shape) >= 2 and min(shape[-2:]) >= MIN_SIDE


class Muon:
    """Momentum and update of a set of fp32 matrices.

    Args:
        names: of the parameters; ``gate_up_proj`` is taken as two matrices per expert.
        masters: (..., rows, columns) each.
        weight_decay: decoupled, times the rate.
    """

    def __init__(
        self, names: Sequence[str], masters: Sequence[Tensor], weight_decay: float
    ) -> None:
        self.weight_decay = weight_decay
        self.buckets: dict[tuple[int, int], list[Tensor]] = {}
        for name, master in zip(names, masters, strict=True):
            rows, columns = master.shape[-2:]
            if name.endswith("gate_up_proj"):
                rows //= 2
            self.buckets.setdefault((rows, columns), []).append(master)
        self.momentum = {
            shape: _stack(masters, shape).zero_() for shape, masters in self.buckets.items()
        }

    @torch.no_grad()
    def step(self, lr: float, bad: Tensor) -> None:
        """Update from the masters' gradients; nothing changes where ``bad`` (a scalar) is 1."""
        skip = bad.bool()
        for shape, masters in self.buckets.items():
            grads = [m.grad if m.grad is not None else torch.zeros_like(m) for m in masters]
            grad, momentum = _stack(grads, shape), self.momentum[shape]
            momentum.copy_(torch.where(skip, momentum, momentum.lerp(grad, 1 - MOMENTUM)))
            update = orthogonalise(grad.lerp(momentum, MOMENTUM))
            update = torch.where(skip, 0.0, update * (lr * 0.2 * max(shape) ** 0.5))
            split = update.split([m.numel() // (shape[0] * shape[1]) for m in masters])
            parts = [p.view_as(m) for p, m in zip(split, masters, strict=True)]
            torch._foreach_mul_(masters, 1 - lr * self.weight_decay * (1 - bad))
            torch._foreach_sub_(masters, parts)

    def tensors(self) -> dict[str, Tensor]:
        """The momenta by shape."""
        return {f"muon.{rows}x{columns}": m for (rows, columns), m in self.momentum.items()}


def orthogonalise(x: Tensor) -> Tensor:
    """(n, rows, columns) -> the same shape, fp32, singular values between about 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    wide = x.shape[1] > x.shape[2]
    y = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    y = (y.mT if wide else y).to(torch.bfloat16 if x.is_cuda else torch.float32)
    for _ in range(ITERATIONS):
        square = y @ y.mT
        y = a * y + torch.baddbmm(square, square, square, beta=b, alpha=c) @ y
    return (y.mT if wide else y).float()


def _stack(tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    return torch.cat([t.detach().reshape(-1, *shape) for t in tensors])
