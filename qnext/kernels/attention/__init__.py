"""Causal grouped-query attention over packed sequences (spec section 3, step 6).

Softmax of ``scale * q k^T`` in fp32; query i of a sequence with ``new`` queries and ``total``
keys sees the keys up to ``total - new + i``. Query head h reads key head ``h // (H // Hkv)``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qnext.errors import KernelError
from qnext.kernels.attention import reference
from qnext.kernels.select import use_triton

__all__ = ["decode_attention", "paged_attention", "varlen_attention"]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    max_seqlen: int | None = None,
) -> Tensor:
    """Attend inside every packed sequence; differentiable.

    Args:
        q: (T, H, D) queries.
        k: (S, Hkv, D) keys, the cached ones of each sequence before its new ones.
        v: (S, Hkv, D) values.
        cu_seqlens_q: (N + 1,) int32 bounds of the sequences in q.
        cu_seqlens_k: (N + 1,) int32 bounds of the sequences in k and v.
        scale: factor on the scores.
        max_seqlen: length of the longest sequence, if known; saves work on a GPU.

    Returns:
        (T, H, D) in the dtype of q.
    """
    if use_triton(q):
        from qnext.kernels.attention import cuda

        if cuda.supports(q):
            longest = max_seqlen or len(k)
            return cuda.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, longest)
    return reference.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)


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
    """Attend over a cache in blocks that already holds the new tokens.

    Args:
        q: (T, H, D) queries of N sequences, one after the other.
        k_cache: (blocks, block_size, Hkv, D), any floating dtype.
        v_cache: (blocks, block_size, Hkv, D).
        block_tables: (N, B) int32 blocks of each sequence, in order.
        context_lens: N counts of tokens that were there before.
        lengths: N counts of queries; query i of a sequence sees its first ``context + i + 1`` rows.
        scale: factor on the scores.
        kv_shift: first row of every sequence (1 for the MTP layer, see ``qnext.layers.state``).

    Returns:
        (T, H, D) in the dtype of q.
    """
    args = (q, k_cache, v_cache, block_tables, context_lens, lengths, scale, kv_shift)
    if use_triton(q):
        from qnext.kernels.attention import paged

        if paged.covers(q):
            return paged.paged_attention(*args)
    return reference.paged_attention(*args)


def decode_attention(
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    rotary: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """The whole mixer between its projections, for a few new tokens over a paged cache.

    Norms and rotates queries and keys, writes the new keys and values to the cache, attends
    causally over cached and new tokens, and applies the output gate (spec section 3).

    Args:
        qkv: (N*R, heads*2*D + 2*Hkv*D) as the projections give it: per head query and gate, then
            keys, then values; R new tokens of each of N sequences, 1 <= R <= 9.
        q_norm: (D,) zero-centred norm weight.
        k_norm: (D,) zero-centred norm weight.
        rotary: (N*R, rotary_dim) fp32, cosines and then sines of each new token's position.
        k_cache: (num_blocks, block_size, Hkv, D), written in place.
        v_cache: (num_blocks, block_size, Hkv, D), written in place.
        block_tables: (N, B) int32; token p of sequence n lies in block ``block_tables[n, p //
            block_size]`` at row ``p % block_size``. Must cover the new tokens.
        context_lens: (N,) int32 tokens of each sequence in the cache before this call.
        heads: query heads.
        eps: of the norms.

    Returns:
        (N*R, heads*D) in the dtype of ``qkv``.

    Raises:
        KernelError: rows that are no multiple of the sequences, or more than 9 of each.
    """
    n = block_tables.shape[0]
    if qkv.shape[0] % n or not 1 <= qkv.shape[0] // n <= 9:
        raise KernelError(
            f"decode attention: {qkv.shape[0]} new tokens of {n} sequences",
            hint="every sequence brings the same 1 to 9 new tokens; longer pieces are prefill",
        )
    args = (qkv, q_norm, k_norm, rotary, k_cache, v_cache, block_tables, context_lens)
    if use_triton(qkv):
        from qnext.kernels.attention import triton_decode

        return triton_decode.decode_attention(*args, heads=heads, eps=eps)
    return reference.decode_attention(*args, heads=heads, eps=eps)
