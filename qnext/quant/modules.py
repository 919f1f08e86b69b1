"""What computes with packed matrices: in place of ``nn.Linear`` and of ``Experts``."""

from __future__ import annotations

from torch import Tensor, nn

from qnext.kernels.scaled_matmul import AnyWeight, scaled_experts, scaled_linear
from qnext.quant.matrix import PackedMatrix


class QuantLinear(nn.Module):
    """``nn.Linear`` with a packed weight; a bias stays plain."""

    def __init__(self, weight: PackedMatrix, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        flat = x.reshape(-1, x.shape[-1])
        out = scaled_linear(flat, self.weight.pack(), self.bias)
        return out.view(*x.shape[:-1], -1)


class QuantExperts(nn.Module):
    """The routed experts with packed matrices; one of the two may be plain."""

    def __init__(
        self, gate_up_proj: PackedMatrix | nn.Parameter, down_proj: PackedMatrix | nn.Parameter
    ) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x (T, H), ids and weights (T, k) -> (T, H)."""
        return scaled_experts(x, _pack(self.gate_up_proj), _pack(self.down_proj), ids, weights)


def _pack(weight: PackedMatrix | nn.Parameter) -> AnyWeight:
    return weight.pack() if isinstance(weight, PackedMatrix) else weight
