"""The gated delta rule (spec section 4; Gated DeltaNet, arXiv 2412.06464).

State S of each value head, (dk, dv), zero at the start of a sequence. For each token:

    S <- exp(g) S;  S <- S + k (beta (v - k^T S))^T;  o = q^T S

``chunk`` computes the same in blocks of 64 tokens (prefill, training), ``recurrent`` token by
token (decoding, verification of drafts).
"""

from __future__ import annotations

from torch import Tensor

from qnext.errors import KernelError
from qnext.kernels.gated_delta import reference
from qnext.kernels.select import use_loops, use_triton

__all__ = ["chunk_gated_delta_rule", "recurrent_gated_delta_rule"]


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rule over packed sequences in chunks of 64; differentiable.

    Args:
        q: (T, Hk, dk), L2-normalised and already times ``dk ** -0.5``.
        k: (T, Hk, dk), L2-normalised.
        v: (T, Hv, dv); value head h belongs to key head ``h // (Hv // Hk)``.
        g: (T, Hv) fp32 logarithm of the decay, at most 0.
        beta: (T, Hv) fp32 write strength in (0, 1).
        cu_seqlens: (N + 1,) int32 starts and end of the sequences.
        initial_state: (N, Hv, dk, dv) fp32, or None for zeros.

    Returns:
        ``(o, final_state)``: o (T, Hv, dv) in the dtype of v, final_state (N, Hv, dk, dv) fp32.

    Raises:
        KernelError: shapes that do not belong together.
    """
    _check(q, k, v, g, beta)
    if use_triton(q):
        from qnext.kernels.gated_delta import triton_chunk

        if triton_chunk.is_hopper_prefill(q, v, cu_seqlens):
            from qnext.kernels.gated_delta import gluon_chunk

            return gluon_chunk.chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens, initial_state)
        return triton_chunk.chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens, initial_state)
    if use_loops(q, v, g, beta):
        from qnext.kernels.gated_delta import loops

        return loops.chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens, initial_state)
    return reference.chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens, initial_state)


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    return_states: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """The rule token by token, for few tokens per sequence.

    Arguments and results are those of :func:`chunk_gated_delta_rule`; with ``return_states`` a
    third result (T, Hv, dk, dv) holds the state after every token.
    """
    _check(q, k, v, g, beta)
    if use_triton(q):
        from qnext.kernels.gated_delta import triton_recurrent

        return triton_recurrent.recurrent_gated_delta_rule(
            q, k, v, g, beta, cu_seqlens, initial_state, return_states
        )
    return reference.recurrent_gated_delta_rule(
        q, k, v, g, beta, cu_seqlens, initial_state, return_states
    )


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    tokens, heads = v.shape[:2]
    if q.shape != k.shape or q.shape[0] != tokens or heads % q.shape[1]:
        raise KernelError(
            f"gated delta rule: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do "
            "not belong together",
            hint="q and k are (T, Hk, dk), v is (T, Hv, dv), and Hv is a multiple of Hk",
        )
    if g.shape != (tokens, heads) or beta.shape != (tokens, heads):
        raise KernelError(
            f"gated delta rule: g {tuple(g.shape)} and beta {tuple(beta.shape)}; both must be "
            f"({tokens}, {heads})"
        )
