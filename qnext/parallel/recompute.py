"""Activation checkpointing by kind of module: forget what is inside, compute it again backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from qnext.layers.attention import GatedAttention
from qnext.layers.decoder import DecoderLayer
from qnext.layers.delta_net import GatedDeltaNet
from qnext.layers.mlp import MLP
from qnext.layers.moe import Experts, SparseMoe
from qnext.layers.norm import GatedRMSNorm, RMSNorm

Kind = Literal["layer", "delta_net", "attention", "mlp", "experts", "norm"]
_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "layer": (DecoderLayer,),
    "delta_net": (GatedDeltaNet,),
    "attention": (GatedAttention,),
    "mlp": (SparseMoe, MLP),
    "experts": (Experts,),
    "norm": (RMSNorm, GatedRMSNorm),
}


def apply_recompute(model: nn.Module, kinds: Sequence[Kind]) -> None:
    """Wrap the forward pass of every module of the kinds; the tree and its names stay."""
    for module in model.modules():
        if any(isinstance(module, _KINDS[kind]) for kind in kinds):
            inner: Callable[..., Any] = module.forward
            # Nothing here draws random numbers, so their state need not be kept.
            module.forward = partial(  # type: ignore[method-assign]
                checkpoint, inner, use_reentrant=False, preserve_rng_state=False
            )
