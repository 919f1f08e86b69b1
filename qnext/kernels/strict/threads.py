"""The strict loops over several threads; which thread does what changes no bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

Array = Any
SMALL = 1 << 18  # multiplications below which a product stays on one thread


def delta_rule(
    qkv: Array, g: Array, beta: Array, bounds: Array, state: Array, out: Array, key_heads: int
) -> None:
    """The delta rule with its heads shared out over threads."""
    heads, count = state.shape[1], min(threads(), state.shape[1])
    cuts = [heads * i // count for i in range(count + 1)]
    arrays = (qkv, g, beta, bounds, state, out, key_heads)
    pairs = pairwise(cuts)
    together(partial(loops().delta_rule, *arrays, *pair) for pair in pairs)


def product(x: Array, w: Array) -> Array:
    """x @ w, with the columns shared out over threads."""
    columns = w.shape[1]
    out = np.empty((len(x), columns), np.float32)
    count = 1 if x.size * columns < SMALL else min(threads(), -(-columns // 64))
    cuts = [columns * i // count // 16 * 16 for i in range(count)] + [columns]
    pairs = pairwise(cuts)
    together(partial(loops().linear, x, w, out, *pair) for pair in pairs)
    return out


@cache
def loops() -> Any:
    """The compiled loops; numba is imported on first use."""
    from qnext.kernels.strict import loops

    return loops


def threads() -> int:
    """As many as torch uses."""
    return torch.get_num_threads()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="qnext-strict")


def together(jobs: Iterable[Callable[[], None]]) -> None:
    """Run jobs on as many threads as torch uses; which one does what changes no bit."""
    jobs = list(jobs)
    if len(jobs) == 1 or threads() == 1:
        for job in jobs:
            job()
        return
    for done in [_pool(threads()).submit(job) for job in jobs]:
        done.result()
