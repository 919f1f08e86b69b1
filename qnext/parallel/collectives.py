"""Collectives that autograd understands: the backward of each is its true transpose.

torch's functional ones know no uneven sizes; these are thin shells around ``torch.distributed``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.contiguous().clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        longest = max(sizes)
        mine = x.new_zeros(longest, *x.shape[1:])
        mine[: len(x)] = x
        every = x.new_empty(longest * len(sizes), *x.shape[1:])
        dist.all_gather_into_tensor(every, mine, group=group)
        if min(sizes) == longest:
            return every
        return torch.cat([part[:n] for part, n in zip(every.split(longest), sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        longest, rank = max(ctx.sizes), dist.get_rank(ctx.group)
        if min(ctx.sizes) == longest:
            every = grad.contiguous()
        else:
            every = grad.new_zeros(longest * len(ctx.sizes), *grad.shape[1:])
            for slot, part in zip(every.split(longest), grad.split(ctx.sizes), strict=True):
                slot[: len(part)] = part
        mine = grad.new_empty(longest, *grad.shape[1:])
        dist.reduce_scatter_tensor(mine, every, group=ctx.group)
        return mine[: ctx.sizes[rank]], None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        out = grad.new_empty(sum(ctx.send), *grad.shape[1:])
        dist.all_to_all_single(out, grad.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return out, None, None, None


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the group, on every rank."""
    return _AllReduce.apply(x, group)  # type: ignore[no-any-return]


def all_gather(x: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Rows of all ranks, one rank after the other; ``sizes`` are their counts, known to all."""
    return _AllGather.apply(x, tuple(sizes), group)  # type: ignore[no-any-return]


def all_to_all(
    x: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Rows cut into ``send`` counts, one piece per rank; gives the pieces of all for this one."""
    return _AllToAll.apply(x, list(send), list(receive), group)  # type: ignore[no-any-return]


def shares(total: int, parts: int) -> list[int]:
    """Even contiguous counts: they differ by one at most."""
    return [total * (n + 1) // parts - total * n // parts for n in range(parts)]
