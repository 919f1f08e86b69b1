"""AdamW on fp32 masters, with the decay groups of the paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qnext.layers.delta_net import DepthwiseConv
from qnext.layers.norm import GatedRMSNorm
from qnext.train.config import OptimizerConfig


def decayed(model: nn.Module, name: str) -> bool:
    """Whether weight decay applies to a parameter.

    Matrices (stacked experts too) and zero-centred norm weights are decayed: pulling the
    latter to zero keeps the norm's scale near one, the announcement's stability measure. Biases,
    A_log, dt_bias, the convolution's taps and plain norm weights are not.
    """
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, DepthwiseConv | GatedRMSNorm):
        return False
    if getattr(owner, "zero_centred", None) is not None:
        return bool(owner.zero_centred)
    return model.get_parameter(name).ndim >= 2


class MasterAdamW:
    """Fused AdamW over fp32 master weights; the model may compute in bfloat16.

    In fp32 the masters are the model's own parameters. A step with a non-finite gradient norm is
    skipped on the device, without a host synchronisation.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.params = [model.get_parameter(n) for n in self.names]
        self.masters = [
            p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.params
        ]
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, master in zip(self.names, self.masters, strict=True):
            groups[decayed(model, name)].append(master)
        self.inner = torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": config.weight_decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    def step(self, lr: float) -> Tensor:
        """Clip, update, copy back; the gradient norm before clipping (scalar on the device)."""
        for param, master in zip(self.params, self.masters, strict=True):
            if master is not param and param.grad is not None:
                master.grad = param.grad.float()
        grads = [m.grad for m in self.masters if m.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        scale = (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, scale)
        self.inner.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()
        copies = [(p, m) for p, m in zip(self.params, self.masters, strict=True) if p is not m]
        if copies:
            with torch.no_grad():
                torch._foreach_copy_([p for p, _ in copies], [m for _, m in copies])
        for tensor in (*self.params, *self.masters):
            tensor.grad = None
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Masters and moments by name: everything a checkpoint must hold."""
        out = {}
        for name, master in zip(self.names, self.masters, strict=True):
            out[f"master.{name}"] = master.detach()
            for key, value in self.inner.state.get(master, {}).items():
                out[f"{key}.{name}"] = value
        return out

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what ``tensors`` gave."""
        with torch.no_grad():
            for name, param, master in zip(self.names, self.params, self.masters, strict=True):
                master.copy_(tensors[f"master.{name}"])
                if master is not param:
                    param.copy_(master)
                for key in ("exp_avg", "exp_avg_sq", "step"):
                    if f"{key}.{name}" in tensors:
                        # AdamW keeps a fused step counter on the parameter's device.
                        value = tensors[f"{key}.{name}"].to(master.device)
                        self.inner.state[master][key] = value.clone()
