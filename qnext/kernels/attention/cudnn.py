"""Prefill attention over a paged cache through cuDNN, for long pieces of one sequence.

cuDNN's fused attention reaches 640 to 710 TFLOP/s at head width 256 on an H200, where the Triton
kernel beside it reaches 410, but knows neither blocks nor a causal mask aligned at the end. So the
keys of a sequence are gathered from their blocks (0.3 % of the time), a piece of new tokens
attends causally to itself and fully to everything before, and the parts are joined by their
log-sum-exp. cuDNN builds a plan for each new pair of lengths (50 to 300 ms), so lengths are powers
of two: at most a few dozen plans, whatever prompts come.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnext.kernels.attention import triton_prefill

#: Most and least new tokens of a piece; what is left over goes to the Triton kernel.
LONGEST, SHORTEST = 32768, 2048


def covers(q: Tensor) -> bool:
    """Whether cuDNN takes this dtype and head width."""
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] in (64, 128, 256)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """(T, H, D), (S, Hkv, D) -> output (T, H, D) and natural log-sum-exp (H, T)."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], None, True,
        0.0, causal, False, scale=scale,
    )  # fmt: skip
    return out[0].transpose(0, 1).contiguous(), lse.reshape(q.shape[1], q.shape[0])


def gather(cache: Tensor, table: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows ``start .. stop`` of a sequence, contiguous: (stop - start, Hkv, D)."""
    size = cache.shape[1]
    blocks = cache.index_select(0, table[: -(-stop // size)])
    return blocks.flatten(0, 1)[start:stop].to(dtype)


def powers(count: int, most: int, least: int) -> list[int]:
    """``count`` as a falling sum of powers of two, without what is below ``least``."""
    sizes = [most] * (count // most)
    count %= most
    while count >= least:
        sizes.append(1 << count.bit_length() - 1)
        count -= sizes[-1]
    return sizes


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    past: int,
    scale: float,
    kv_shift: int = 0,
) -> Tensor:
    """New tokens q (T, H, D) of one sequence whose rows, the new ones too, are in the cache."""
    pieces = powers(len(q), LONGEST, SHORTEST)
    stop = kv_shift + past + sum(pieces)
    if pieces:
        k, v = (gather(cache, table, kv_shift, stop, q.dtype) for cache in (k_cache, v_cache))
    outputs, start = [], 0
    for size in pieces:
        outputs.append(_piece(q[start : start + size], k, v, past + start, scale))
        start += size
    if start < len(q):
        rest, lens = len(q) - start, torch.empty(1, dtype=torch.int32, device=q.device)
        bounds = torch.arange(0, 2 * rest, rest, dtype=torch.int32, device=q.device)
        args = (table[None], lens.fill_(past + start), bounds, scale, rest, kv_shift)
        outputs.append(triton_prefill.attend_paged(q[start:], k_cache, v_cache, *args)[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _piece(q: Tensor, k: Tensor, v: Tensor, past: int, scale: float) -> Tensor:
    """Rows ``past ..`` of a sequence against the rows up to and with them."""
    stop = past + len(q)
    out, lse = sdpa(q, k[past:stop], v[past:stop], scale, True)
    start = 0
    for size in powers(past, LONGEST, 1):
        part = slice(start, start + size)
        joined, _, lse = triton_prefill.merge((out, lse), sdpa(q, k[part], v[part], scale, False))
        out = joined.view(q.shape)
        start += size
    return out
