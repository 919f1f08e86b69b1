"""Paged attention on CUDA: cuDNN for long pieces, one Triton launch for each run of short ones.

Measured on an H200 (docs/benchmarks.md): at 1,024 new tokens Triton is the faster one, at 4,096
cuDNN, which takes one sequence at a time. A few new tokens are decoding: the prefill kernel does
not split the past over multiprocessors, so that they take the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor

from qnext.kernels.attention import cudnn, reference, triton_prefill

#: New tokens below which a sequence is decoded rather than prefilled.
FEW = 16


def covers(q: Tensor) -> bool:
    """Whether the kernels take this dtype and head width."""
    width = q.shape[-1]
    return q.dtype != torch.float64 and 16 <= width <= 256 and width & (width - 1) == 0


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Sequence[int],
    lengths: Sequence[int],
    scale: float,
    kv_shift: int = 0,
) -> Tensor:
    """See the contract in ``qnext.kernels.attention``."""
    wide = cudnn.covers(q)

    def kind(n: int) -> str:
        if lengths[n] < FEW:
            return "few"
        return "long" if wide and lengths[n] >= cudnn.SHORTEST else "short"

    parts, start = [], 0
    for name, run in groupby(range(len(lengths)), key=kind):
        numbers = list(run)
        first, stop = numbers[0], numbers[-1] + 1
        if name == "long":
            for n in numbers:
                piece = q[start : start + lengths[n]]
                past = context_lens[n]
                args = (k_cache, v_cache, block_tables[n], past, scale, kv_shift)
                parts.append(cudnn.attend(piece, *args))
                start += lengths[n]
            continue
        rows = sum(lengths[first:stop])
        if name == "few":
            parts.append(
                reference.paged_attention(
                    q[start : start + rows], k_cache, v_cache, block_tables[first:stop],
                    context_lens[first:stop], lengths[first:stop], scale, kv_shift,
                )
            )  # fmt: skip
            start += rows
            continue
        counts = [*context_lens[first:stop], *accumulate(lengths[first:stop], initial=0)]
        lens, bounds = torch.tensor(counts, dtype=torch.int32, device=q.device).split(
            [stop - first, stop - first + 1]
        )
        out, _ = triton_prefill.attend_paged(
            q[start : start + rows], k_cache, v_cache, block_tables[first:stop], lens, bounds,
            scale, max(lengths[first:stop]), kv_shift,
        )  # fmt: skip
        parts.append(out)
        start += rows
    return parts[0] if len(parts) == 1 else torch.cat(parts)
