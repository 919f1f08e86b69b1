"""Whole half-layers for a handful of rows on a CPU: norm, mixer or MLP, residual sum.

The reference is the layer itself in torch; ``loops`` has the same arithmetic in compiled loops
(numba, extra ``cpu``). ``qnext.layers.fused`` connects the two.
"""

from __future__ import annotations

__all__ = ["MAX_ROWS"]

# Beyond this many rows torch's matrix products win over the loops.
MAX_ROWS = 8
