"""Cross-entropy of logits and its slope, for losses that never hold the logits of all tokens.

Per row t with label y >= 0: ``loss = logsumexp(x) - x[y]`` and
``slope = scale * (softmax(x) - onehot(y))``; rows with a negative label give zeros.
"""

from __future__ import annotations

from torch import Tensor

from qnext.errors import KernelError
from qnext.kernels.cross_entropy import reference
from qnext.kernels.select import use_triton

__all__ = ["cross_entropy"]


def cross_entropy(logits: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Losses and slopes of a block of rows; fp32 inside. Not differentiable: it is the gradient.

    Args:
        logits: (T, V), contiguous; their memory may be taken for the slopes.
        labels: (T,) int64; negative leaves a row out.
        scale: factor on the slopes, such as one over the number of labels.

    Returns:
        ``(losses, slopes)``: (T,) fp32 (fp64 for fp64), and (T, V) in the dtype of the logits.

    Raises:
        KernelError: one label per row is needed.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise KernelError(
            f"cross_entropy: logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not "
            "belong together",
            hint="logits are (T, V), labels (T,)",
        )
    if use_triton(logits) and logits.is_contiguous():
        from qnext.kernels.cross_entropy import triton

        return triton.cross_entropy(logits, labels, scale)
    return reference.cross_entropy(logits, labels, scale)
