"""Half layers for many rows on a CPU: products in register tiles, and what lies between them.

Rows are shared out over threads by the caller (``qnext.layers.fused_prefill``), so every function
works on a range of rows or heads and holds no lock. Products take their inputs in BF16
(AVX512-BF16: twice the rate, inputs rounded, sums in fp32) or FP32; the kind of the arrays decides.
"""

from __future__ import annotations

__all__: list[str] = []
