"""Expert parallelism: each rank holds some experts; tokens travel to them and back."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from qnext.kernels.experts import experts as run_experts
from qnext.layers.model import CausalLM
from qnext.layers.moe import Experts
from qnext.parallel.collectives import all_to_all
from qnext.parallel.local import show

STACKS = ("gate_up_proj", "down_proj")


def apply_expert_parallel(model: CausalLM, mesh: DeviceMesh) -> None:
    """Cut the stacks of all experts over the ranks of a one-axis mesh."""
    for module in model.modules():
        if not isinstance(module, Experts):
            continue
        for name in STACKS:
            whole = getattr(module, name)
            # Every rank has the same weights (or none yet), so nothing is sent.
            part = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)
            setattr(module, name, nn.Parameter(part))
        show(module, dict.fromkeys(STACKS, _local))
        module.forward = partial(_forward, module, mesh.get_group())  # type: ignore[method-assign]


def _local(weight: Tensor) -> Tensor:
    # With two axes it is still cut by FSDP as well.
    if isinstance(weight, DTensor) and weight.device_mesh.ndim == 1:
        return weight.to_local()
    return weight


def _forward(
    module: Experts, group: dist.ProcessGroup, x: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """As ``Experts.forward``; ids are those of all experts."""
    ranks, local = dist.get_world_size(group), len(module.gate_up_proj)
    chosen = ids.flatten()
    order = chosen.argsort(stable=True)  # by expert, hence by rank
    chosen = chosen[order]
    owner = chosen // local
    counts = torch.zeros(ranks, dtype=torch.int64, device=x.device)
    counts.scatter_add_(0, owner, torch.ones_like(owner))
    coming = torch.empty_like(counts)
    dist.all_to_all_single(coming, counts, group=group)
    # The one synchronisation with the host: the sizes of what is sent and received.
    send, receive = torch.stack([counts, coming]).tolist()
    rows = all_to_all(x[order // ids.shape[1]], send, receive, group)
    which = all_to_all(chosen % local, send, receive, group)
    if not len(rows):  # the weights must get a gradient, if only of zeros
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        which = which.new_zeros(1)
    one = rows.new_ones(len(rows), 1)
    out = run_experts(rows, module.gate_up_proj, module.down_proj, which.unsqueeze(1), one)
    back = all_to_all(out[: sum(receive)], receive, send, group)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=x.device)
    per_choice = back[inverse].view(*ids.shape, x.shape[1])
    return (per_choice * weights.unsqueeze(-1)).sum(1)
