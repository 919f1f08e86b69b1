"""The one rule that chooses between a torch reference and its Triton twin."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

from torch import Tensor


@cache
def _triton_usable() -> bool:
    """Whether Triton is installed and ``QNEXT_REFERENCE=1`` does not forbid it."""
    return os.environ.get("QNEXT_REFERENCE", "0") != "1" and find_spec("triton") is not None


def use_triton(x: Tensor) -> bool:
    """True where ``x`` lies on a CUDA device and Triton may be used.

    ``QNEXT_REFERENCE=1`` in the environment forces the references everywhere: the switch for
    bisecting a wrong result.
    """
    return x.is_cuda and _triton_usable()
