"""Ops for a CPU whose every rounding is fixed by their source: same row, same bits.

Torch's matrix products and elementwise functions choose other code for other shapes, so that a
row's last bits depend on its neighbours, its place and the number of threads. The loops here are
compiled without any freedom (no reordered sums, no contraction; fused multiply-adds where the
source says so), in an order that a row's own inputs decide. ``qnext.layers.invariant`` builds a
model of them.
"""

from __future__ import annotations

__all__: list[str] = []
