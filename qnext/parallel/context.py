"""Context parallelism: each rank holds a piece of the packed tokens, sequences may span ranks.

Attention gathers keys and values. DeltaNet needs the last inputs of the convolution and one state:
over a rank's tokens the state changes by an affine map ``S -> A S + B`` (A is dk x dk), so ranks
exchange (A, B), whose size does not depend on the length, and each composes those before it. The
outputs are affine in the incoming state too, hence one pass more and no waiting for neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from qnext.kernels.attention import varlen_attention
from qnext.kernels.causal_conv import causal_conv
from qnext.kernels.gated_delta import chunk_gated_delta_rule
from qnext.kernels.rotary import apply_rotary
from qnext.layers.attention import GatedAttention
from qnext.layers.delta_net import GatedDeltaNet
from qnext.layers.model import CausalLM
from qnext.layers.packed import PackedBatch
from qnext.parallel.collectives import all_gather, shares


@dataclass(frozen=True, slots=True)
class ContextBatch(PackedBatch):
    """A rank's piece of a packed batch.

    ``context_lens`` counts the tokens of the first sequence that lie on earlier ranks.

    Attributes:
        sizes: tokens of every rank.
    """

    sizes: tuple[int, ...] = ()


def cut(batch: PackedBatch, index: int, count: int) -> tuple[ContextBatch, slice]:
    """Piece ``index`` of ``count`` even ones, and which tokens it has.

    A piece without tokens would leave a rank without gradients; it is the caller's business to
    have at least ``count`` tokens.
    """
    total = sum(batch.lengths)
    sizes = shares(total, count)
    begin = sum(sizes[:index])
    end = begin + sizes[index]
    bounds = list(accumulate(batch.lengths, initial=0))
    lengths, past = [], []
    for start, stop in pairwise(bounds):
        first, last = max(start, begin), min(stop, end)
        if first < last:
            lengths.append(last - first)
            past.append(first - start)
    edges = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    piece = ContextBatch(
        positions=batch.positions[begin:end],
        lengths=tuple(lengths),
        cu_seqlens=edges.to(batch.cu_seqlens.device),
        context_lens=tuple(past),
        sizes=tuple(sizes),
    )
    return piece, slice(begin, end)


def apply_context_parallel(model: CausalLM, group: dist.ProcessGroup) -> None:
    """Replace the forward passes of all mixers; batches must be :class:`ContextBatch`."""
    for module in model.modules():
        if isinstance(module, GatedAttention):
            module.forward = partial(_attention, module, group)  # type: ignore[method-assign]
        elif isinstance(module, GatedDeltaNet):
            module.forward = partial(_delta_net, module, group)  # type: ignore[method-assign]


def _attention(
    mixer: GatedAttention,
    group: dist.ProcessGroup,
    x: Tensor,
    batch: ContextBatch,
    rotary: tuple[Tensor, Tensor],
    state: None = None,
) -> Tensor:
    """As ``GatedAttention.forward``, over the keys and values of all ranks up to this one."""
    tokens = len(x)
    q = mixer.q_proj(x).view(tokens, mixer.num_heads, -1)
    gate = None
    if mixer.gated:
        q, gate = q.chunk(2, -1)
    k = mixer.k_proj(x).view(tokens, mixer.num_kv_heads, -1)
    v = mixer.v_proj(x).view(tokens, mixer.num_kv_heads, -1)
    q = apply_rotary(mixer.q_norm(q), *rotary)
    k = apply_rotary(mixer.k_norm(k), *rotary)
    keys, values = all_gather(torch.stack([k, v], 1), batch.sizes, group).unbind(1)
    begin = sum(batch.sizes[: dist.get_rank(group)])
    past = batch.context_lens[0] if batch.context_lens else 0
    part = slice(begin - past, begin + tokens)
    bounds = batch.cu_seqlens.clone()
    bounds[1:] += past  # only the first sequence reaches back
    out = varlen_attention(
        q, keys[part], values[part], batch.cu_seqlens, bounds, mixer.head_dim**-0.5,
        past + batch.max_length,
    )  # fmt: skip
    if gate is not None:
        out = out * gate.sigmoid()
    return mixer.o_proj(out.reshape(tokens, -1))


def _delta_net(
    mixer: GatedDeltaNet,
    group: dist.ProcessGroup,
    x: Tensor,
    batch: ContextBatch,
    state: None = None,
) -> Tensor:
    """As ``GatedDeltaNet.forward``, continuing what earlier ranks hold of the first sequence."""
    tokens = len(x)
    qkv, z = mixer.in_proj_qkv(x), mixer.in_proj_z(x)
    beta, g = mixer.gates(mixer.in_proj_b(x), mixer.in_proj_a(x))
    weight = mixer.conv1d.weight.squeeze(1)
    window = _halo(qkv, weight.shape[1] - 1, batch, group)
    mixed, _ = causal_conv(qkv, weight, batch.cu_seqlens, window)
    out = _delta_rule(*mixer._heads(mixed), g, beta, batch, group)
    out = mixer.norm(out, z.view(tokens, mixer.num_v_heads, -1))
    return mixer.out_proj(out.reshape(tokens, -1))


def _halo(x: Tensor, width: int, batch: ContextBatch, group: dist.ProcessGroup) -> Tensor:
    """(N, C, width): the last inputs of earlier ranks before the first sequence, else zeros."""
    rank = dist.get_rank(group)
    tails = [min(width, size) for size in batch.sizes]
    every = all_gather(x[len(x) - tails[rank] :], tails, group)
    before = every[: sum(tails[:rank])]
    have = min(batch.context_lens[0] if batch.context_lens else 0, width)
    first = torch.cat([x.new_zeros(width - have, x.shape[1]), before[len(before) - have :]])
    others = x.new_zeros(len(batch.lengths) - 1, x.shape[1], width)
    return torch.cat([first.t().unsqueeze(0), others])


def _delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    batch: ContextBatch,
    group: dist.ProcessGroup,
) -> Tensor:
    """The rule from zero states, plus what the incoming state adds to the first sequence."""
    out, end = chunk_gated_delta_rule(q, k, v, g, beta, batch.cu_seqlens)
    heads, dk = v.shape[1], k.shape[2]
    goes_on = bool(batch.context_lens and batch.context_lens[0])
    first = slice(0, batch.lengths[0])
    spread = end.new_zeros(heads, dk, dk)
    if goes_on:
        # Without values and from the identity, the same rule gives A, and q^T A for every token.
        eye = torch.eye(dk, dtype=end.dtype, device=end.device).expand(1, heads, dk, dk)
        bounds = batch.cu_seqlens[:2]
        reach, spread = chunk_gated_delta_rule(
            q[first], k[first], v.new_zeros(batch.lengths[0], heads, dk, dtype=end.dtype),
            g[first], beta[first], bounds, eye.contiguous(),
        )  # fmt: skip
        spread = spread[0]
    passes = goes_on and len(batch.lengths) == 1  # one sequence from the first token to the last
    outgoing = spread if passes else torch.zeros_like(spread)
    both = torch.cat([outgoing, end[-1]], 2).unsqueeze(0)  # (1, Hv, dk, dk + dv)
    maps = all_gather(both, [1] * len(batch.sizes), group)
    incoming = torch.zeros_like(end[0])
    for past in maps[: dist.get_rank(group)]:
        incoming = past[..., :dk] @ incoming + past[..., dk:]
    if not goes_on:
        # Nothing to add, but the gather's backward is a collective: its node stays in the graph.
        return out + maps[:0].sum().to(out.dtype)
    extra = torch.einsum("thk,hkv->thv", reach, incoming).to(out.dtype)
    return torch.cat([out[first] + extra, out[first.stop :]])
