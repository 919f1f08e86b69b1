"""The gated delta rule on a CPU in a compiled loop (numba): prefill without gradients.

One head's state stays in the first-level cache, so going token by token takes less time than the
chunked form does to pass its arrays through memory. Heads are shared out over threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, cast

import numba
import numpy as np
import torch
from torch import Tensor

Array = Any


@numba.njit(cache=True, fastmath={"reassoc", "contract", "nsz"}, nogil=True, error_model="numpy")
def _heads(
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    beta: Array,
    bounds: Array,
    state: Array,
    out: Array,
    first: int,
    last: int,
) -> None:
    """Value heads ``first`` to ``last`` of every sequence; ``state`` (N, Hv, dk, dv) advances."""
    ratio, dk, dv = v.shape[1] // q.shape[1], q.shape[2], v.shape[2]
    ahead = np.empty(dv, np.float32)
    for n in range(len(bounds) - 1):
        for head in range(first, last):
            s = state[n, head]
            for t in range(bounds[n], bounds[n + 1]):
                qt, kt = q[t, head // ratio], k[t, head // ratio]
                vt, o, gate = v[t, head], out[t, head], decay[t, head]
                ahead[:] = 0
                for i in range(dk):
                    line, ki = s[i], kt[i]
                    for j in range(dv):
                        ahead[j] += ki * line[j]
                for j in range(dv):
                    ahead[j] = beta[t, head] * (vt[j] - gate * ahead[j])
                o[:] = 0
                for i in range(dk):
                    line, ki, qi = s[i], kt[i], qt[i]
                    for j in range(dv):
                        value = gate * line[j] + ki * ahead[j]
                        line[j] = value
                        o[j] += qi * value


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="qnext-delta")


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See the contract in ``qnext.kernels.gated_delta``; fp32 on a CPU, no gradients."""
    shape = (len(cu_seqlens) - 1, v.shape[1], q.shape[2], v.shape[2])
    if initial_state is None:
        state = torch.zeros(shape)
    else:
        state = initial_state.to(torch.float32, copy=True).contiguous()
    out = torch.empty(v.shape)
    arrays: list[Any] = [x.contiguous().numpy() for x in (q, k, v, g.exp(), beta)]
    arrays += [cu_seqlens.numpy(), state.numpy(), out.numpy()]
    heads, threads = shape[1], min(torch.get_num_threads(), shape[1])
    cuts = [heads * i // threads for i in range(threads + 1)]
    part = cast("Callable[..., None]", _heads)  # compiled: mypy would check its Python signature
    jobs = [_pool(threads).submit(part, *arrays, first, last) for first, last in pairwise(cuts)]
    for job in jobs:
        job.result()
    return out, state
