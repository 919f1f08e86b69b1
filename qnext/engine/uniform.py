"""Random numbers that are pure functions of (seed, index): the i-th token of a sequence.

No generator is kept, so batches, drafts, preemption and restarts cannot shift anyone's numbers.
SplitMix64 (Steele, Lea and Flood 2014): its i-th output mixes ``state + (i + 1) * gamma``; here
the state is the mixed seed, so that neighbouring seeds share nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_30, _27, _31, _16 = (np.uint64(n) for n in (30, 27, 31, 16))


def streams(seeds: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The state of each seed, for `uniforms`."""
    return _mixed(seeds + _GAMMA)


def uniforms(states: NDArray[np.uint64], indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Numbers in [0, 1), multiples of 2^-48: u * total < total holds in float64.

    Args:
        states: (R,) of `streams`.
        indices: (R,) numbers of tokens, from 0.
    """
    steps = indices.astype(np.uint64) + np.uint64(1)
    return (_mixed(states + steps * _GAMMA) >> _16).astype(np.float64) * np.float64(2.0**-48)


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> _30)) * _FIRST
    z = (z ^ (z >> _27)) * _SECOND
    return z ^ (z >> _31)
