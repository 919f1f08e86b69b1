"""Random initial weights for training and tests (spec section 10).

Every parameter has a generator of its own, seeded by the run's seed and the parameter's name: so a
rank can draw the ones it holds, one at a time, and gets what a single process gets.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from qnext.checkpoint.load import empty_model, parse_device, parse_dtype
from qnext.config import ModelConfig
from qnext.layers.delta_net import DepthwiseConv
from qnext.layers.model import CausalLM
from qnext.layers.moe import SparseMoe
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
        seed: of the CPU generators that draw the weights, so that every device gets the same;
            None takes a seed from torch's global generator.

    Returns:
        The model in training mode.
    """
    target = parse_dtype(dtype) or torch.float32
    if str(device) == "meta":
        with torch.device("meta"):
            return CausalLM(config).to(target)
    model = empty_model(config, target, {}, torch.device("cpu"))
    if seed is None:
        seed = int(torch.randint(1 << 62, ()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            initialise(model, name, parameter, seed)
    return model.to(parse_device(device)).train()


def initialise(model: nn.Module, name: str, out: Tensor, seed: int) -> None:
    """Draw one whole parameter.

    Args:
        model: where the parameter belongs, on any device.
        name: of the parameter.
        out: of its full shape, on the CPU; written.
        seed: of the run.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    parent = model.get_submodule(path.rpartition(".")[0])
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    if isinstance(owner, RMSNorm):
        out.fill_(0.0 if owner.zero_centred else 1.0)
    elif isinstance(owner, GatedRMSNorm):
        out.fill_(1.0)
    elif isinstance(owner, DepthwiseConv):
        bound = out.shape[-1] ** -0.5
        out.uniform_(-bound, bound, generator=rng)
    elif leaf == "A_log":
        out.uniform_(0.01, 16, generator=rng).log_()
    elif leaf == "dt_bias":
        # Step sizes from 1e-3 to 0.1, log-uniform, as in Mamba2 and flash-linear-attention: at the
        # start memories last from ten to a thousand tokens. (Hugging Face sets dt_bias to one.)
        step = out.uniform_(math.log(1e-3), math.log(0.1), generator=rng).exp()
        out.copy_(step + torch.log(-torch.expm1(-step)))
    elif leaf == "bias":
        out.zero_()
    elif isinstance(parent, SparseMoe) and path.endswith(".gate"):
        # Rows of one norm: at the start no expert is favoured by the length of its row. The
        # announcement says "normalised"; the exact formula is not published.
        out.normal_(0, 1, generator=rng)
        out.mul_(STD * math.sqrt(out.shape[1]) / out.norm(dim=1, keepdim=True))
    else:
        out.normal_(0, STD, generator=rng)
