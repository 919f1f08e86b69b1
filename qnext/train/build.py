"""The model of a run, cut for this rank; and put together again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qnext.checkpoint import build_model, load_model
from qnext.checkpoint.init import initialise
from qnext.checkpoint.load import empty_model, restore_buffers
from qnext.config import ModelConfig
from qnext.layers.model import CausalLM
from qnext.parallel import Mesh, Ranks, parallelise
from qnext.parallel.data import cut_like, whole
from qnext.parallel.recompute import apply_recompute
from qnext.train.config import TrainConfig
from qnext.train.loss import Objective


def build_objective(
    config: TrainConfig,
    model_config: ModelConfig,
    mesh: Mesh | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Objective:
    """The model in fp32 with its first weights, wrapped in its losses.

    Over ranks it is cut while it is still empty; then each rank draws or reads one parameter
    after the other and keeps its part.

    Args:
        config: of the run.
        model_config: of the model.
        mesh: the ranks, if there are several.
        device: of this rank.
        dtype: of the forward and backward pass.
    """
    if mesh is None:
        if config.init_from is not None:
            model = load_model(config.init_from, dtype="float32", device=device).train()
        else:
            model = build_model(model_config, "float32", device, seed=config.seed)
        apply_recompute(model, config.recompute)
        return Objective(model, config.loss)
    model = build_model(model_config, "float32", "meta").train()
    objective = Objective(model, config.loss, Ranks(mesh))
    parallelise(objective, model, mesh, config.parallel, dtype, config.recompute)
    model.to_empty(device=device)
    restore_buffers(model, device)
    _fill(model, _first_weights(config, model))
    return objective


def _first_weights(config: TrainConfig, model: CausalLM) -> Callable[[str, Tensor], Tensor]:
    """Gives a whole parameter on the CPU, from its name and its cut twin."""
    if config.init_from is not None:
        given = dict(load_model(config.init_from, device="cpu").named_parameters())
        return lambda name, _: given[name]

    def draw(name: str, like: Tensor) -> Tensor:
        out = torch.empty(like.shape)
        initialise(model, name, out, config.seed)
        return out

    return draw


@torch.no_grad()
def _fill(model: nn.Module, give: Callable[[str, Tensor], Tensor]) -> None:
    for name, param in model.named_parameters():
        mine = param.to_local() if isinstance(param, DTensor) else param
        mine.copy_(cut_like(give(name, param), param))


def gathered(model: CausalLM, keep: bool) -> CausalLM | None:
    """A BF16 copy on the CPU, on the ranks that keep it; all must call."""
    copy = empty_model(model.config, torch.bfloat16, {}, torch.device("cpu")) if keep else None
    target = dict(copy.named_parameters()) if copy is not None else {}
    with torch.no_grad():
        for name, param in model.named_parameters():
            full = whole(param)
            if copy is not None:
                target[name].copy_(full)
    return copy
