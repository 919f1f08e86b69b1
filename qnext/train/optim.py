"""AdamW and Muon on fp32 masters, with the decay groups of the paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qnext.layers.delta_net import DepthwiseConv
from qnext.layers.norm import GatedRMSNorm
from qnext.train.config import OptimizerConfig
from qnext.train.muon import Muon, wants_muon


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


class MasterOptimizer:
    """Fused AdamW, and Muon on request, over fp32 masters; the model may compute in bfloat16.

    In fp32 the masters are the model's own parameters. A step with a non-finite gradient norm, or
    one ``spike_factor`` above its running mean, is skipped on the device without a host
    synchronisation and counted in ``skipped``.

    Args:
        model: still in fp32; it is cast to ``dtype`` after the masters are taken.
        config: rates and groups.
        dtype: that the model computes in. Every parameter is cast, A_log, dt_bias and router
            too: what is trained is then exactly what a BF16 export holds.
    """

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, dtype: torch.dtype = torch.float32
    ) -> None:
        self.config = config
        wide = {n: p.detach() for n, p in model.named_parameters()}
        model.to(dtype)
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.params = [model.get_parameter(n) for n in self.names]
        self.masters = [
            p if dtype == torch.float32 else nn.Parameter(wide[n])
            for n, p in zip(self.names, self.params, strict=True)
        ]
        device = self.params[0].device
        self.skipped = torch.zeros((), dtype=torch.float32, device=device)
        self.mean_norm = torch.zeros((), dtype=torch.float32, device=device)
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        matrices: dict[str, Tensor] = {}
        for name, master in zip(self.names, self.masters, strict=True):
            if config.kind == "muon" and wants_muon(model, name):
                matrices[name] = master
            else:
                groups[decayed(model, name)].append(master)
        self.muon: Muon | None = None
        if matrices:
            self.muon = Muon(list(matrices), list(matrices.values()), config.weight_decay)
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

    def collect(self) -> None:
        """Add the model's gradients to those of the masters, in fp32; once per micro batch."""
        sums, parts = [], []
        for param, master in zip(self.params, self.masters, strict=True):
            if master is param or param.grad is None:
                continue
            if master.grad is None:
                master.grad = param.grad.float()
            else:
                sums.append(master.grad)
                parts.append(param.grad)
            param.grad = None
        if sums:
            torch._foreach_add_(sums, [part.float() for part in parts])

    def step(self, lr: float) -> Tensor:
        """Clip, update, copy back; the gradient norm before clipping (scalar on the device)."""
        self.collect()
        grads = [m.grad for m in self.masters if m.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        scale = (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, scale)
        bad = self._judge(norm)
        self.skipped += bad
        self.inner.found_inf = bad  # type: ignore[attr-defined]
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()
        if self.muon is not None:
            self.muon.step(lr, bad)
        copies = [(p, m) for p, m in zip(self.params, self.masters, strict=True) if p is not m]
        if copies:
            with torch.no_grad():
                torch._foreach_copy_([p for p, _ in copies], [m for _, m in copies])
        for tensor in (*self.params, *self.masters):
            tensor.grad = None
        return norm

    def _judge(self, norm: Tensor) -> Tensor:
        """1.0 if the step must be skipped, 0.0 if not; keeps the running mean of the norm."""
        bad = ~torch.isfinite(norm)
        seen = norm
        if self.config.spike_factor:
            limit = torch.where(self.mean_norm > 0, self.config.spike_factor * self.mean_norm, norm)
            bad |= norm > limit
            seen = norm.minimum(limit)  # a lasting rise is let through after a few steps
        mean = torch.where(self.mean_norm > 0, 0.95 * self.mean_norm + 0.05 * seen, seen)
        self.mean_norm.copy_(torch.where(torch.isfinite(mean), mean, self.mean_norm))
        return bad.float()

    def tensors(self) -> dict[str, Tensor]:
        """Masters and moments by name: everything a checkpoint must hold."""
        out = {"skipped": self.skipped, "mean_norm": self.mean_norm}
        out |= self.muon.tensors() if self.muon is not None else {}
        for name, master in zip(self.names, self.masters, strict=True):
            out[f"master.{name}"] = master.detach()
            for key, value in self.inner.state.get(master, {}).items():
                out[f"{key}.{name}"] = value
        return out

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what ``tensors`` gave."""
        with torch.no_grad():
            self.skipped.copy_(tensors["skipped"])
            self.mean_norm.copy_(tensors["mean_norm"])
            for name, momentum in (self.muon.tensors() if self.muon is not None else {}).items():
                momentum.copy_(tensors[name])
            for name, param, master in zip(self.names, self.params, self.masters, strict=True):
                master.copy_(tensors[f"master.{name}"])
                if master is not param:
                    param.copy_(master)
                for key in ("exp_avg", "exp_avg_sq", "step"):
                    if f"{key}.{name}" in tensors:
                        # AdamW keeps a fused step counter on the parameter's device.
                        value = tensors[f"{key}.{name}"].to(master.device)
                        self.inner.state[master][key] = value.clone()
