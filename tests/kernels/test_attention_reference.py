"""Packed attention against a softmax written out per head and query."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from qnext.kernels.attention import varlen_attention


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize(
    ("new", "past"), [([5], [0]), ([1], [7]), ([3], [4]), ([1, 4, 6], [5, 0, 2]), ([2, 1], [0, 0])]
)
def test_causal_and_aligned_at_the_end(
    heads: tuple[int, int], new: list[int], past: list[int]
) -> None:
    rng = torch.Generator().manual_seed(0)
    h, kv = heads
    total = [a + b for a, b in zip(new, past, strict=True)]
    q = torch.randn(sum(new), h, 8, generator=rng, dtype=torch.float64)
    k, v = torch.randn(2, sum(total), kv, 8, generator=rng, dtype=torch.float64)
    q_bounds, k_bounds = ([*accumulate(x, initial=0)] for x in (new, total))
    cu_q, cu_k = (torch.tensor(b, dtype=torch.int32) for b in (q_bounds, k_bounds))
    out = varlen_attention(q, k, v, cu_q, cu_k, 0.3)
    for n, count in enumerate(new):
        for i in range(count):
            seen = slice(k_bounds[n], k_bounds[n] + past[n] + i + 1)
            for head in range(h):
                row = q_bounds[n] + i
                scores = 0.3 * k[seen, head * kv // h] @ q[row, head]
                expected = scores.softmax(0) @ v[seen, head * kv // h]
                torch.testing.assert_close(out[row, head], expected, rtol=0, atol=1e-13)
