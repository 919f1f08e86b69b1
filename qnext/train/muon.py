"""Muon for the hidden matrices (arXiv 2502.16982), stacked experts included.

The update is the momentum with all its singular values brought near one, by Newton-Schulz
iterations, times ``0.2 sqrt(max(rows, columns))``: then its size is that of AdamW's and both take
the same rate and decay. Matrices of one shape are iterated together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qnext.errors import ConfigError
from qnext.layers.delta_net import DepthwiseConv
from qnext.parallel.data import cut_like, part_of

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MIN_SIDE = 16


def wants_muon(model: nn.Module, name: str) -> bool:
    """Whether a parameter is a hidden matrix: no embedding, head, router, gate row or tap."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    weight = owner._parameters[leaf]
    if isinstance(owner, nn.Embedding | DepthwiseConv) or path.endswith(("lm_head", "mlp.gate")):
        return False
    return weight is not None and weight.ndim >= 2 and min(weight.shape[-2:]) >= MIN_SIDE


class Muon:
    """Momentum and update of a set of fp32 matrices.

    Stacked experts that are dealt out to ranks are updated where they lie. Of a matrix whose rows
    are cut, the directions are gathered, each rank iterates some of the matrices of a shape, and
    their sum gives all ranks all updates.

    Args:
        names: of the parameters; ``gate_up_proj`` is taken as two matrices per expert.
        masters: (..., rows, columns) each, or this rank's part of it.
        weight_decay: decoupled, times the rate.
        cut: the parameters that are cut over ranks, by name.

    Raises:
        ConfigError: experts whose rows are cut over ranks.
    """

    def __init__(
        self,
        names: Sequence[str],
        masters: Sequence[Tensor],
        weight_decay: float,
        cut: Mapping[str, DTensor] | None = None,
    ) -> None:
        self.weight_decay = weight_decay
        self.masters = dict(zip(names, masters, strict=True))
        self.momentum = {n: torch.zeros_like(m.detach()) for n, m in self.masters.items()}
        self.spread = {n: p for n, p in (cut or {}).items() if p.ndim == 2 and n in self.masters}
        self.buckets: dict[tuple[int, int, bool], list[str]] = {}
        for name in names:
            whole = (cut or {}).get(name)
            if whole is not None and any(p.is_shard(1) for p in whole.placements):
                raise ConfigError(
                    f"Muon needs whole experts on a rank, {name} is cut inside them",
                    hint="use fewer ranks per expert, or optimizer.kind = 'adamw'",
                )
            rows, columns = (self.masters[name] if whole is None else whole).shape[-2:]
            if name.endswith("gate_up_proj"):
                rows //= 2
            key = (rows, columns, name in self.spread)
            self.buckets.setdefault(key, []).append(name)

    @torch.no_grad()
    def step(self, lr: float, bad: Tensor) -> None:
        """Update from the masters' gradients; nothing changes where ``bad`` (a scalar) is 1."""
        skip = bad.bool()
        for (rows, columns, spread), names in self.buckets.items():
            masters = [self.masters[n] for n in names]
            directions = []
            for name, master in zip(names, masters, strict=True):
                grad = master.grad if master.grad is not None else torch.zeros_like(master)
                momentum = self.momentum[name]
                momentum.copy_(torch.where(skip, momentum, momentum.lerp(grad, 1 - MOMENTUM)))
                directions.append(grad.lerp(momentum, MOMENTUM))
            if spread:
                parts = self._gathered(names, directions)
            else:
                stack = torch.cat([d.reshape(-1, rows, columns) for d in directions])
                split = orthogonalise(stack).split([m.numel() // (rows * columns) for m in masters])
                parts = [p.view_as(m) for p, m in zip(split, masters, strict=True)]
            size = lr * 0.2 * max(rows, columns) ** 0.5
            parts = [torch.where(skip, 0.0, p * size) for p in parts]
            torch._foreach_mul_(masters, 1 - lr * self.weight_decay * (1 - bad))
            torch._foreach_sub_(masters, parts)

    def _gathered(self, names: list[str], directions: list[Tensor]) -> list[Tensor]:
        """This rank's parts of the updates of matrices that are cut."""
        cut = [self.spread[n] for n in names]
        full = torch.stack(
            [part_of(d, p).full_tensor() for d, p in zip(directions, cut, strict=True)]
        )
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        updates = torch.zeros_like(full)
        if len(full[mine]):
            updates[mine] = orthogonalise(full[mine])
        dist.all_reduce(updates)
        return [cut_like(u, p) for u, p in zip(updates, cut, strict=True)]


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
