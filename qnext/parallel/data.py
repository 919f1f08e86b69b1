"""Data parallelism: FSDP2 over all ranks, whatever else they share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from qnext.layers.decoder import DecoderLayer
from qnext.layers.model import CausalLM
from qnext.layers.moe import Experts
from qnext.parallel.mesh import Mesh, ParallelConfig


def shard(
    root: nn.Module, model: CausalLM, mesh: Mesh, config: ParallelConfig, dtype: torch.dtype
) -> None:
    """Cut every parameter: a unit per layer, experts on their own where they are spread.

    Args:
        root: the module whose forward pass (or ``score``) is called; contains ``model``.
        model: what is cut.
        mesh: the ranks.
        config: whether gathered weights are given back early.
        dtype: of the forward and backward pass; gradients are summed in fp32 (or fp64).
    """
    narrow = dtype in (torch.bfloat16, torch.float16)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if narrow else None,
        reduce_dtype=torch.float32 if narrow else None,
        cast_forward_inputs=False,
    )
    early = config.reshard_after_forward
    layers = [m for m in model.modules() if isinstance(m, DecoderLayer)]
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, Experts) and config.expert_parallel_size > 1:
                rest = mesh.experts["expert_shard"]
                # Whole experts where they can be dealt out, else rows of each.
                whole = len(module.gate_up_proj) % rest.size() == 0
                fully_shard(
                    module, mesh=rest, mp_policy=policy, reshard_after_forward=early,
                    shard_placement_fn=None if whole else lambda _: Shard(1),
                )  # fmt: skip
        fully_shard(layer, mesh=mesh.world, mp_policy=policy, reshard_after_forward=early)
    fully_shard(root, mesh=mesh.world, mp_policy=policy)
    register_fsdp_forward_method(root, "score")  # a second way in, for evaluation
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # The loss is normalised for the whole step, so gradients add up and are not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def part_of(part: Tensor, like: DTensor) -> DTensor:
    """A tensor of which this rank holds ``part``, cut as ``like`` is; shares memory."""
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape,
        stride=like.stride(),
    )  # fmt: skip


def cut_like(full: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a full tensor that is cut as ``like`` is."""
    if isinstance(full, DTensor):
        return full.to_local()
    if not isinstance(like, DTensor):
        return full
    shape, offset = compute_local_shape_and_global_offset(
        like.shape, like.device_mesh, like.placements
    )
    return full[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


def whole(param: Tensor) -> Tensor:
    """All of a parameter, on every rank; a collective where it is cut."""
    return param.full_tensor().detach() if isinstance(param, DTensor) else param.detach()
