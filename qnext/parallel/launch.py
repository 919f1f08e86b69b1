"""Being one of many processes: what torchrun tells, and a clean end."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from qnext.errors import ConfigError
from qnext.parallel.mesh import Mesh, ParallelConfig


def join(config: ParallelConfig, device: torch.device) -> Mesh | None:
    """Join the ranks that torchrun started; None for a process on its own.

    Raises:
        ConfigError: a layout of several ranks without torchrun, or one that does not divide.
    """
    if not dist.is_initialized() and not dist.is_torchelastic_launched():
        sizes = {n: s for n, s in config.model_dump().items() if n.endswith("_size") and s > 1}
        if sizes:
            asked = ", ".join(f"parallel.{n} = {s}" for n, s in sizes.items())
            raise ConfigError(
                f"{asked} needs more processes than this one",
                hint="start it with torchrun --nproc-per-node N -m qnext.train RECIPE.toml",
            )
        return None
    if not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", dist.get_node_local_rank())
            torch.cuda.set_device(device)
        # Checkpoints are written through the CPU, beside the training on CUDA.
        # Gathering experts takes two steps on purpose; it is not worth a warning each time.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    elif device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return Mesh.of(config, device)


def leave() -> None:
    """End the process group, if there is one, once all ranks are done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
