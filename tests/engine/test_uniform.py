from __future__ import annotations

import numpy as np
import pytest
from sampling_oracle import uniform

from qnext.engine.uniform import streams, uniforms


def test_numbers_are_splitmix64_of_seed_and_index() -> None:
    seeds = np.array([0, 1, 2, 2**63, 2**64 - 1], np.uint64)
    indices = np.array([0, 5, 10**6, 3, 2**40], np.int64)
    found = uniforms(streams(seeds), indices)
    assert found.dtype == np.float64
    want = [uniform(int(s), int(i)) for s, i in zip(seeds, indices, strict=True)]
    assert found.tolist() == want
    # the published first outputs of SplitMix64 for state 1234567 (Vigna's reference in C)
    raw = uniforms(np.array([1234567], np.uint64), np.arange(3))
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert (raw * 2**48).tolist() == [number >> 16 for number in published]


@pytest.mark.parametrize("along", ["indices", "seeds"])
def test_numbers_are_uniform_and_uncorrelated(along: str) -> None:
    """By 64 cells and by neighbours, over the indices of a seed and over neighbouring seeds."""
    count = 2**16
    if along == "indices":
        numbers = uniforms(streams(np.full(count, 7, np.uint64)), np.arange(count))
    else:
        numbers = uniforms(streams(np.arange(count, dtype=np.uint64)), np.zeros(count, np.int64))
    assert 0 <= numbers.min() < numbers.max() < 1
    counts, _ = np.histogram(numbers, 64, (0, 1))
    assert ((counts - count / 64) ** 2 / (count / 64)).sum() < 110  # 63 degrees: p = 2e-4
    for lag in (1, 2, 3):
        assert abs(np.corrcoef(numbers[:-lag], numbers[lag:])[0, 1]) < 4 / count**0.5
