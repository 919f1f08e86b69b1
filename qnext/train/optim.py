"""AdamW and Muon on fp32 masters, with the decay groups of the paper."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qnext.layers.delta_net import DepthwiseConv
from qnext.layers.norm import GatedRMSNorm
from qnext.parallel.data import cut_like, part_of
from qnext.train.config import OptimizerConfig
from qnext.train.muon import Muon, wants_muon


def decayed(model: nn.Module, name: str) -> bool:
    """Whether weight decay applies to a parameter.

    Matrices (stacked experts too) and zero-centred norm weights are decayed: pulling the
    latter to zero keeps the norm's scale near one, the announcement's stability measure. Biases,
    A_log, dt_bias, the convolution's taps and plain norm weights are not.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, DepthwiseConv | GatedRMSNorm):
        return False
    if getattr(owner, "zero_centred", None) is not None:
        return bool(owner.zero_centred)
    weight = owner._parameters[leaf]
    return weight is not None and weight.ndim >= 2


class MasterOptimizer:
    """Fused AdamW, and Muon on request, over fp32 masters; the model may compute in bfloat16.

    In fp32 the masters are the model's own parameters; of parameters that are cut over ranks they
    are this rank's parts. A step with a non-finite gradient norm, or one ``spike_factor`` above its
    running mean, is skipped on the device without a host synchronisation and counted in
    ``skipped``.

    Args:
        model: still in fp32; it is cast to ``dtype`` after the masters are taken.
        config: rates and groups.
        dtype: that the model computes in. Every parameter is cast, A_log, dt_bias and router
            too: what is trained is then exactly what a BF16 export holds. Of a model cut over
            ranks FSDP casts, and the masters are cut parameters.
    """

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, dtype: torch.dtype = torch.float32
    ) -> None:
        self.config = config
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.cut = {n: p for n, p in named.items() if isinstance(p, DTensor)}
        wide = {n: p.detach() for n, p in named.items()}
        if not self.cut:
            model.to(dtype)
        self.names = list(named)
        self.params = [dict(model.named_parameters())[n] for n in self.names]
        self.masters = [_master(p, wide[n]) for n, p in zip(self.names, self.params, strict=True)]
        self.copies = [
            (p, m)
            for p, m in zip(self.params, self.masters, strict=True)
            if p is not m and not isinstance(p, DTensor)
        ]
        device = self.masters[0].device
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
            self.muon = Muon(list(matrices), list(matrices.values()), config.weight_decay, self.cut)
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
            grad = param.grad
            grad = (grad.to_local() if isinstance(grad, DTensor) else grad).to(master.dtype)
            if master.grad is None:
                master.grad = grad
            else:
                sums.append(master.grad)
                parts.append(grad)
            param.grad = None
        if sums:
            torch._foreach_add_(sums, parts)

    def norm(self) -> Tensor:
        """The norm of all gradients, over all ranks (scalar on the device)."""
        norm = torch.nn.utils.get_total_norm([m.grad for m in self.masters if m.grad is not None])
        if self.cut:
            # Every number lies on exactly one rank.
            square = norm.square()
            dist.all_reduce(square)
            norm = square.sqrt()
        return norm

    def step(self, lr: float) -> Tensor:
        """Clip, update, copy back; the gradient norm before clipping (scalar on the device)."""
        self.collect()
        grads = [m.grad for m in self.masters if m.grad is not None]
        norm = self.norm()
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
        if self.copies:
            with torch.no_grad():
                torch._foreach_copy_([p for p, _ in self.copies], [m for _, m in self.copies])
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
        """Masters and moments by name: everything a checkpoint must hold.

        Those of parameters that are cut over ranks are given as DTensors cut in the same way.
        """
        out = {"skipped": self.skipped, "mean_norm": self.mean_norm}
        momenta = self.muon.momentum if self.muon is not None else {}
        for name, master in zip(self.names, self.masters, strict=True):
            out[f"master.{name}"] = self._whole(name, master.detach())
            for key, value in self.inner.state.get(master, {}).items():
                out[f"{key}.{name}"] = value if key == "step" else self._whole(name, value)
            if name in momenta:
                out[f"muon.{name}"] = self._whole(name, momenta[name])
        return out

    def _whole(self, name: str, part: Tensor) -> Tensor:
        like = self.cut.get(name)
        return part if like is None else part_of(part, like)

    def prepare(self) -> None:
        """Make the moments (zeros) before the first step, so that they can be loaded into."""
        for group in self.inner.param_groups:
            for master in group["params"]:
                if not self.inner.state[master]:
                    self.inner.state[master] = {
                        "step": torch.zeros((), dtype=torch.float32, device=master.device),
                        "exp_avg": torch.zeros_like(master),
                        "exp_avg_sq": torch.zeros_like(master),
                    }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what ``tensors`` gave; whole tensors are cut where the parameter is."""
        if any(name.startswith("exp_avg.") for name in tensors):
            self.prepare()
        with torch.no_grad():
            for name, mine in self.tensors().items():
                if name in tensors and tensors[name] is not mine:
                    target = mine.to_local() if isinstance(mine, DTensor) else mine
                    target.copy_(cut_like(tensors[name], mine))
            if self.copies:
                torch._foreach_copy_([p for p, _ in self.copies], [m for _, m in self.copies])


def _master(param: nn.Parameter, wide: Tensor) -> nn.Parameter:
    """The parameter itself, its fp32 copy, or this rank's part of it (sharing its memory)."""
    if isinstance(param, DTensor):
        return nn.Parameter(param.to_local().detach())
    return param if param.dtype == wide.dtype else nn.Parameter(wide)
