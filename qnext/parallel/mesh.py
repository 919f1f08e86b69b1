"""Who is who: ranks as (data, context, tensor), and once more as (expert shard, expert)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qnext.config import ModelConfig
from qnext.errors import ConfigError


class ParallelConfig(BaseModel):
    """How ranks share the work; what is left of them is data parallel.

    Parameters, gradients and moments are cut over all ranks (FSDP2) in every layout.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    context_parallel_size: int = Field(default=1, gt=0)
    """Ranks that share the tokens of a sequence."""
    tensor_parallel_size: int = Field(default=1, gt=0)
    """Ranks that share the heads of a mixer."""
    expert_parallel_size: int = Field(default=1, gt=0)
    """Ranks that hold different experts; any of the ranks, whatever else they share."""
    reshard_after_forward: bool = True
    """Give gathered weights back after the forward pass and gather them again in the backward."""


@dataclass(frozen=True)
class Mesh:
    """The process groups of a layout, and this process's place in them.

    Attributes:
        device: that this rank computes on.
        world: all ranks, one axis.
        grid: axes data, context, tensor; tensor is the fastest.
        experts: axes expert_shard, expert; expert is the fastest.
    """

    device: torch.device
    world: DeviceMesh
    grid: DeviceMesh
    experts: DeviceMesh

    @classmethod
    def of(cls, config: ParallelConfig, device: torch.device) -> Mesh:
        """Make the groups; every rank must call it.

        Raises:
            ConfigError: sizes that do not divide the number of ranks.
        """
        ranks = dist.get_world_size()
        context, tensor = config.context_parallel_size, config.tensor_parallel_size
        expert = config.expert_parallel_size
        if ranks % (context * tensor):
            raise ConfigError(
                f"{ranks} ranks do not divide into parallel.context_parallel_size {context} x "
                f"parallel.tensor_parallel_size {tensor}"
            )
        if ranks % expert:
            raise ConfigError(
                f"{ranks} ranks do not divide by parallel.expert_parallel_size {expert}"
            )
        kind = device.type
        shape = (ranks // (context * tensor), context, tensor)
        return cls(
            device,
            init_device_mesh(kind, (ranks,), mesh_dim_names=("world",)),
            init_device_mesh(kind, shape, mesh_dim_names=("data", "context", "tensor")),
            init_device_mesh(
                kind, (ranks // expert, expert), mesh_dim_names=("expert_shard", "expert")
            ),
        )

    def place(self, axis: str) -> tuple[int, int]:
        """``(index, size)`` of this rank on an axis of the grid."""
        return self.grid.get_local_rank(axis), self.grid.size(self.grid.mesh_dim_names.index(axis))  # type: ignore[union-attr]

    def check(self, model: ModelConfig, config: ParallelConfig) -> None:
        """Refuse a model that a layout cannot cut.

        Raises:
            ConfigError: heads or experts that do not divide.
        """
        tensor, expert = config.tensor_parallel_size, config.expert_parallel_size
        wrong = []
        counts = [("num_attention_heads", model.num_attention_heads)]
        if "linear_attention" in model.layer_types:
            counts.append(("linear_num_key_heads", model.linear_num_key_heads))
        for name, count in counts:
            if count % tensor:
                wrong.append(f"model.{name} {count} by parallel.tensor_parallel_size {tensor}")
        kv_heads = model.num_key_value_heads
        if kv_heads % tensor and tensor % kv_heads:
            wrong.append(
                f"model.num_key_value_heads {kv_heads} by parallel.tensor_parallel_size {tensor}"
            )
        if expert > 1 and (not model.num_experts or model.num_experts % expert):
            wrong.append(
                f"model.num_experts {model.num_experts} by parallel.expert_parallel_size {expert}"
            )
        if wrong:
            raise ConfigError("these do not divide: " + "; ".join(wrong))
        if tensor > 1 and model.attention_bias:
            raise ConfigError("tensor parallelism of attention with biases is not supported")
