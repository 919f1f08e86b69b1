"""The order of the surgery, and what the loss must know of the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qnext.layers.model import CausalLM
from qnext.layers.packed import PackedBatch
from qnext.parallel.collectives import all_gather, shares
from qnext.parallel.context import ContextBatch, apply_context_parallel
from qnext.parallel.data import shard
from qnext.parallel.expert import apply_expert_parallel
from qnext.parallel.mesh import Mesh, ParallelConfig
from qnext.parallel.recompute import Kind, apply_recompute
from qnext.parallel.tensor import apply_tensor_parallel


class Alone:
    """One process computes every token of a micro batch."""

    def sum_counts(self, counts: Tensor) -> Tensor:
        """Expert counts of all ranks from those of this one."""
        return counts

    def before(self, values: Tensor, batch: PackedBatch) -> Tensor:
        """For every token the value of the one before it."""
        return values.roll(1)

    def rows(self, tokens: int) -> slice:
        """The tokens whose logits this process computes."""
        return slice(0, tokens)


class Ranks(Alone):
    """Ranks of a mesh share the tokens of a micro batch."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.tensor, self.tensor_ranks = mesh.place("tensor")
        self.context, _ = mesh.place("context")

    def sum_counts(self, counts: Tensor) -> Tensor:
        """Expert counts of all ranks from those of this one."""
        counts = counts.clone()
        dist.all_reduce(counts, group=self.mesh.world.get_group())
        return counts

    def before(self, values: Tensor, batch: PackedBatch) -> Tensor:
        """For every token the value of the one before it, which may lie on another rank."""
        if not isinstance(batch, ContextBatch):
            return values.roll(1)
        every = all_gather(values, batch.sizes, self.mesh.grid.get_group("context"))
        begin = sum(batch.sizes[: self.context])
        return every.roll(1)[begin : begin + len(values)]

    def rows(self, tokens: int) -> slice:
        """The tokens whose logits this rank computes: ranks that share heads divide them."""
        sizes = shares(tokens, self.tensor_ranks)
        begin = sum(sizes[: self.tensor])
        return slice(begin, begin + sizes[self.tensor])


def parallelise(
    root: nn.Module,
    model: CausalLM,
    mesh: Mesh,
    config: ParallelConfig,
    dtype: torch.dtype,
    recompute: Sequence[Kind] = (),
) -> None:
    """Cut a built model (on any device, also meta) for this rank, in a fixed order.

    Args:
        root: the module whose forward pass is called; contains ``model``.
        model: the same on every rank.
        mesh: the ranks.
        config: the layout ``mesh`` was made from.
        dtype: of the forward and backward pass.
        recompute: modules whose activations are computed again in the backward pass.

    Raises:
        ConfigError: a model that the layout cannot cut.
    """
    mesh.check(model.config, config)
    # Context before tensor: it replaces the mixers' forward passes, which tensor then closes.
    if config.context_parallel_size > 1:
        apply_context_parallel(model, mesh.grid.get_group("context"))
    if config.tensor_parallel_size > 1:
        apply_tensor_parallel(model, mesh.grid.get_group("tensor"))
    if config.expert_parallel_size > 1:
        apply_expert_parallel(model, mesh.experts["expert"])
    apply_recompute(model, recompute)
    shard(root, model, mesh, config, dtype)
