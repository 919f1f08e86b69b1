"""Tensor parallelism: ranks share the heads of a mixer, the width of an MLP, the tokens of a MoE.

Weights are not stored in parts: FSDP cuts all of them over all ranks anyway, and a module reads its
rows of what was gathered. So a checkpoint does not depend on the layout, and cuts that are not
contiguous (q, k and v in one matrix) are plain indexing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qnext.layers.attention import GatedAttention
from qnext.layers.decoder import DecoderLayer
from qnext.layers.delta_net import GatedDeltaNet
from qnext.layers.mlp import MLP
from qnext.layers.model import CausalLM
from qnext.layers.moe import SparseMoe
from qnext.parallel.collectives import all_gather, all_reduce, shares
from qnext.parallel.local import View, show


def apply_tensor_parallel(model: CausalLM, group: dist.ProcessGroup) -> None:
    """Let every mixer and MLP compute this rank's share and close it with a sum."""
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    for module in list(model.modules()):
        if isinstance(module, GatedAttention):
            _attention(module, rank, count)
        elif isinstance(module, GatedDeltaNet):
            _delta_net(module, rank, count)
        elif isinstance(module, DecoderLayer) and isinstance(module.mlp, MLP):
            _mlp(module.mlp, rank, count)
            _close(module.mlp, group)
        elif isinstance(module, SparseMoe):
            module.forward = partial(_moe, module.forward, group)  # type: ignore[method-assign]
        if isinstance(module, GatedAttention | GatedDeltaNet):
            _close(module, group)


def _close(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Sum the outputs over the group."""
    inner: Callable[..., Tensor] = module.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return all_reduce(inner(*args, **kwargs), group)

    module.forward = forward  # type: ignore[method-assign]


def _show(module: nn.Module, views: dict[str, View]) -> None:
    """Views of gathered weights; a DTensor is a weight that is still cut."""

    def gathered(view: View) -> View:
        return lambda x: x if isinstance(x, DTensor) else view(x)

    show(module, {name: gathered(view) for name, view in views.items()})


def _rows(total: int, rank: int, count: int) -> View:
    """This rank's even part of dimension 0."""
    size = total // count
    return lambda x: x.narrow(0, rank * size, size)


def _columns(total: int, rank: int, count: int) -> View:
    size = total // count
    return lambda x: x.narrow(1, rank * size, size)


def _attention(module: GatedAttention, rank: int, count: int) -> None:
    heads, kv_heads, dim = module.num_heads, module.num_kv_heads, module.head_dim
    each = max(kv_heads // count, 1)
    first = rank * kv_heads // count  # beyond one head a rank, neighbours share one

    def kv(x: Tensor) -> Tensor:
        return x.narrow(0, first * dim, each * dim)

    _show(module.q_proj, {"weight": _rows(len(module.q_proj.weight), rank, count)})
    _show(module.k_proj, {"weight": kv})
    _show(module.v_proj, {"weight": kv})
    _show(module.o_proj, {"weight": _columns(heads * dim, rank, count)})
    module.num_heads, module.num_kv_heads = heads // count, each


def _delta_net(module: GatedDeltaNet, rank: int, count: int) -> None:
    key, value = module.key_dim, module.value_dim
    parts = [_rows(key, rank, count), _rows(key, rank, count), _rows(value, rank, count)]

    def segments(x: Tensor) -> Tensor:
        pieces = x.split([key, key, value])
        return torch.cat([part(piece) for part, piece in zip(parts, pieces, strict=True)])

    values = _rows(value, rank, count)
    heads = _rows(module.num_v_heads, rank, count)
    _show(module.in_proj_qkv, {"weight": segments})
    _show(module.conv1d, {"weight": segments})
    _show(module.in_proj_z, {"weight": values})
    _show(module.in_proj_b, {"weight": heads})
    _show(module.in_proj_a, {"weight": heads})
    _show(module, {"A_log": heads, "dt_bias": heads})
    _show(module.out_proj, {"weight": _columns(value, rank, count)})
    module.num_k_heads //= count
    module.num_v_heads //= count
    module.key_dim //= count
    module.value_dim //= count


def _mlp(module: MLP, rank: int, count: int) -> None:
    width = len(module.gate_proj.weight)
    sizes = shares(width, count)
    begin, size = sum(sizes[:rank]), sizes[rank]
    _show(module.gate_proj, {"weight": lambda x: x.narrow(0, begin, size)})
    _show(module.up_proj, {"weight": lambda x: x.narrow(0, begin, size)})
    _show(module.down_proj, {"weight": lambda x: x.narrow(1, begin, size)})


def _moe(
    inner: Callable[..., Tensor], group: dist.ProcessGroup, x: Tensor, stats: Any = None
) -> Tensor:
    """Experts see each token once: every rank takes some tokens, then all get all outputs."""
    sizes = shares(len(x), dist.get_world_size(group))
    begin = sum(sizes[: dist.get_rank(group)])
    mine = x[begin : begin + sizes[dist.get_rank(group)]]
    return all_gather(inner(mine, stats), sizes, group)
