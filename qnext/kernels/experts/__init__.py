"""Sparse mixture of experts: routing, and the experts' SwiGLU (spec section 5)."""

from __future__ import annotations

from torch import Tensor

from qnext.errors import KernelError
from qnext.kernels.experts import reference
from qnext.kernels.select import use_triton

__all__ = ["experts", "route"]


def route(logits: Tensor, top_k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """Choose experts: fp32 softmax over all, top-k, optionally renormalised.

    Args:
        logits: (T, E) router outputs.
        top_k: experts per token.
        norm_topk_prob: divide the chosen weights by their sum.

    Returns:
        ``(weights, ids)``: (T, k) in the dtype of the logits, and (T, k) int64, best first.
    """
    return reference.route(logits, top_k, norm_topk_prob)


def experts(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """``sum_k weights[t, k] * down(silu(gate(x_t)) * up(x_t))`` over the chosen experts.

    Args:
        x: (T, H) inputs.
        gate_up_proj: (E, 2I, H), the gate rows first.
        down_proj: (E, H, I).
        ids: (T, k) int64 chosen experts.
        weights: (T, k) routing weights.

    Returns:
        (T, H) in the dtype of x.

    Raises:
        KernelError: expert matrices that do not fit x.
    """
    num, double, hidden = gate_up_proj.shape
    if hidden != x.shape[1] or down_proj.shape != (num, hidden, double // 2):
        raise KernelError(
            f"experts: x {tuple(x.shape)}, gate_up_proj {tuple(gate_up_proj.shape)}, down_proj "
            f"{tuple(down_proj.shape)} do not belong together"
        )
    if use_triton(x):
        from qnext.kernels.experts import grouped

        return grouped.experts_grouped(x, gate_up_proj, down_proj, ids, weights)
    return reference.experts(x, gate_up_proj, down_proj, ids, weights)
