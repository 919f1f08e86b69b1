"""Attention on CUDA through torch's own varlen flash attention (torch.nn.attention.varlen)."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _options() -> frozenset[str]:
    """Names that this torch's ``varlen_attn`` takes; 2.11 and 2.13 differ."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def supports(q: Tensor) -> bool:
    """Whether the flash backend covers this dtype and head width."""
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    max_seqlen: int,
) -> Tensor:
    """See the contract in ``qnext.kernels.attention``; the lengths are never read on the host."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale}
    if "window_size" in _options():
        options["window_size"] = (-1, 0)
    else:
        options["is_causal"] = True
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in _options():
            options["enable_gqa"] = True
        else:
            ratio = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    out = varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen, max_seqlen, **options)
    return out[0] if isinstance(out, tuple) else out
