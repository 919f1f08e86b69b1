"""The one rule that chooses between a torch reference and its Triton or compiled twin."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def usable(package: str) -> bool:
    """Whether a compiler is installed and ``QNEXT_REFERENCE=1`` does not forbid it."""
    return os.environ.get("QNEXT_REFERENCE", "0") != "1" and find_spec(package) is not None


def use_triton(x: Tensor) -> bool:
    """True where ``x`` lies on a CUDA device and Triton may be used.

    ``QNEXT_REFERENCE=1`` in the environment forces the references everywhere: the switch for
    bisecting a wrong result.
    """
    return x.is_cuda and usable("triton")


def use_loops(*inputs: Tensor) -> bool:
    """True for fp32 inputs on a CPU that need no gradients, where numba is installed."""
    plain = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in inputs)
    grads = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return plain and not grads and usable("numba")
