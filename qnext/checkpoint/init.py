"""Random initial weights for training and tests (spec section 10)."""

from __future__ import annotations

import math

import torch
from torch import nn

from qnext.checkpoint.load import empty_model, parse_device, parse_dtype
from qnext.config import ModelConfig
from qnext.layers.delta_net import GatedDeltaNet
from qnext.layers.model import CausalLM
from qnext.layers.moe import Experts, SparseMoe
from qnext.layers.norm import GatedRMSNorm, RMSNorm

STD = 0.02


def build_model(
    config: ModelConfig,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    *,
    seed: int | None = 0,
) -> CausalLM:
    """A model with random weights.

    Args:
        config: what to build.
        dtype: of the parameters.
        device: where; "meta" allocates nothing.
        seed: of the CPU generator that draws the weights, so that every device gets the same;
            None uses torch's global generator.

    Returns:
        The model in training mode.
    """
    target = parse_dtype(dtype) or torch.float32
    if str(device) == "meta":
        with torch.device("meta"):
            return CausalLM(config).to(target)
    model = empty_model(config, target, {}, torch.device("cpu"))
    generator = torch.default_generator if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            _init(module, generator)
    return model.to(parse_device(device)).train()


def _init(module: nn.Module, rng: torch.Generator) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        module.weight.normal_(0, STD, generator=rng)
        bias = getattr(module, "bias", None)
        if bias is not None:
            bias.zero_()
    elif isinstance(module, RMSNorm):
        module.weight.fill_(0.0 if module.zero_centred else 1.0)
    elif isinstance(module, GatedRMSNorm):
        module.weight.fill_(1.0)
    elif isinstance(module, Experts):
        module.gate_up_proj.normal_(0, STD, generator=rng)
        module.down_proj.normal_(0, STD, generator=rng)
    elif isinstance(module, GatedDeltaNet):
        _init_delta_net(module, rng)
    if isinstance(module, SparseMoe):
        # Rows of one norm: at the start no expert is favoured by the length of its row. The
        # announcement says "normalised"; the exact formula is not published.
        gate = module.gate.weight
        gate.normal_(0, 1, generator=rng)
        gate.mul_(STD * math.sqrt(gate.shape[1]) / gate.norm(dim=1, keepdim=True))


def _init_delta_net(module: GatedDeltaNet, rng: torch.Generator) -> None:
    bound = module.conv1d.weight.shape[-1] ** -0.5
    module.conv1d.weight.uniform_(-bound, bound, generator=rng)
    module.A_log.uniform_(0.01, 16, generator=rng).log_()
    # Step sizes from 1e-3 to 0.1, log-uniform, as in Mamba2 and flash-linear-attention: at the
    # start memories last from ten to a thousand tokens. (Hugging Face sets dt_bias to one.)
    step = torch.empty_like(module.dt_bias).uniform_(math.log(1e-3), math.log(0.1), generator=rng)
    step.exp_()
    module.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
