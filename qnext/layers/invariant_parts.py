"""The parts of a decoder layer in strict loops; see ``qnext.layers.invariant``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qnext.kernels.strict.threads import delta_rule, loops, product, threads, together
from qnext.layers.attention import GatedAttention
from qnext.layers.decoder import DecoderLayer
from qnext.layers.delta_net import GatedDeltaNet
from qnext.layers.mlp import MLP
from qnext.layers.moe import SparseMoe
from qnext.layers.norm import RMSNorm
from qnext.layers.packed import CacheIndex
from qnext.layers.state import DeltaState, KVCache, Pending

Array = Any


@dataclass(frozen=True, slots=True)
class Step:
    """A packed batch with the arrays that every layer needs."""

    index: CacheIndex
    lengths: Sequence[int]
    pasts: Sequence[int]
    bounds: Array
    tables: Array
    cos: Array
    sin: Array


class Layer:
    """One decoder layer: ``h += mixer(norm(h)); h += mlp(norm(h))``."""

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, DecoderLayer)
        self._norms = (Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm))
        self._mixer: DeltaNet | Attention
        if layer.kind == "linear_attention":
            self._mixer = DeltaNet(layer.linear_attn)
        else:
            self._mixer = Attention(layer.self_attn)
        self._mlp = Moe(layer.mlp) if isinstance(layer.mlp, SparseMoe) else Mlp(layer.mlp)

    def __call__(self, rows: Array, step: Step, state: KVCache | DeltaState) -> None:
        """Advance (T, hidden) rows in place, and the state."""
        mixer, mlp = self._norms
        rows += self._mixer(mixer(rows), step, state)
        rows += self._mlp(mlp(rows))


class Norm:
    """RMSNorm of rows."""

    def __init__(self, norm: RMSNorm) -> None:
        self._weight, self._eps = _norm_weight(norm), norm.eps

    def __call__(self, rows: Array) -> Array:
        """(T, H) -> (T, H)."""
        out = np.empty_like(rows)
        loops().rms_norm(rows, self._weight, self._eps, out)
        return out


class DeltaNet:
    """Gated DeltaNet (spec section 4), token by token."""

    def __init__(self, m: GatedDeltaNet) -> None:
        names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
        self._qkv, self._z, self._b, self._a, self._out = (
            matrix(getattr(m, name).weight) for name in names
        )
        self._taps = np.ascontiguousarray(_vector(m.conv1d.weight.squeeze(1)).T)
        self._rate = -torch.from_numpy(_vector(m.A_log)).exp().numpy()
        self._dt_bias, self._norm = _vector(m.dt_bias), _vector(m.norm.weight)
        self._eps = m.norm.eps
        self._heads = (m.num_k_heads, m.num_v_heads, m.head_k_dim, m.head_v_dim)

    def __call__(self, x: Array, step: Step, state: KVCache | DeltaState) -> Array:
        """(T, H) -> (T, H)."""
        assert isinstance(state, DeltaState)
        qkv, z = product(x, self._qkv), product(x, self._z)
        if state.conv_state.dtype != torch.float32:  # what the state will remember of it
            qkv = torch.from_numpy(qkv).to(state.conv_state.dtype).float().numpy()
        _, heads, _, dv = self._heads
        beta, g = np.empty((2, len(x), heads), np.float32)
        b, a = product(x, self._b), product(x, self._a)
        loops().gates(b, a, self._rate, self._dt_bias, beta, g)
        out = np.empty((len(x), heads, dv), np.float32)
        state.pending = []
        for part in step.index.rounds:
            rows = part.rows if isinstance(part.rows, slice) else part.rows.numpy()
            bounds = part.cu_seqlens.numpy()
            windows = state.conv_state[part.slots].float().transpose(1, 2).contiguous()
            start = state.recurrent_state[part.slots].clone()
            inputs, decay, write = qkv[rows], g[rows], beta[rows]
            mixed = self._convolve(inputs, bounds, windows.numpy())
            found = np.empty((len(inputs), heads, dv), np.float32)
            delta_rule(mixed, decay, write, bounds, start.numpy(), found, self._heads[0])
            out[rows] = found
            if part.provisional:
                state.pending.append(self._pending(part, mixed, decay, write, inputs))
                continue
            state.recurrent_state[part.slots] = start
            state.conv_state[part.slots] = windows.transpose(1, 2).to(state.conv_state.dtype)
            for slot, snapshot in part.saves:
                state.copy(slot, snapshot)
        loops().gated_norm(out.reshape(-1, dv), z.reshape(-1, dv), self._norm, self._eps)
        return product(out.reshape(len(x), -1), self._out)

    def _convolve(self, inputs: Array, bounds: Array, windows: Array) -> Array:
        """Convolution, SiLU, and the L2 norms of q and k: (t, C) -> (t, C)."""
        key_heads, _, dk, _ = self._heads
        mixed = np.empty_like(inputs)
        loops().conv_silu(inputs, self._taps, bounds, windows, mixed)
        loops().unit_heads(mixed, 0, key_heads, dk, dk**-0.5)
        loops().unit_heads(mixed, key_heads * dk, key_heads, dk, 1.0)
        return mixed

    def _pending(self, part: Any, mixed: Array, g: Array, beta: Array, inputs: Array) -> Pending:
        key_heads, heads, dk, dv = self._heads
        _, k, v = np.split(mixed, [key_heads * dk, 2 * key_heads * dk], 1)
        arrays = (k.reshape(-1, key_heads, dk), v.reshape(-1, heads, dv), g, beta, inputs)
        kept = [torch.from_numpy(x) for x in arrays]
        return StrictPending(part, *kept)


class Attention:
    """Gated attention (spec section 3): every row over the keys of its sequence in order."""

    def __init__(self, a: GatedAttention) -> None:
        self._heads = (a.num_heads, a.num_kv_heads, a.head_dim)
        shape = (a.num_heads, -1, a.head_dim, a.q_proj.weight.shape[1])
        q, *gate = a.q_proj.weight.view(shape).unbind(1)  # each head's query, then its gate
        bias: list[Tensor | None] = [None, None]
        if a.q_proj.bias is not None:
            bias[: 1 + len(gate)] = a.q_proj.bias.view(shape[:3]).unbind(1)
        self._q = (matrix(q.flatten(0, 1)), _bias(bias[0]))
        self._gate = (matrix(gate[0].flatten(0, 1)), _bias(bias[1])) if gate else None
        self._k, self._v, self._o = (
            (matrix(p.weight), _bias(p.bias)) for p in (a.k_proj, a.v_proj, a.o_proj)
        )
        self._q_norm, self._k_norm = _norm_weight(a.q_norm), _norm_weight(a.k_norm)
        self._eps = a.q_norm.eps

    def __call__(self, x: Array, step: Step, state: KVCache | DeltaState) -> Array:
        """(T, H) -> (T, H)."""
        assert isinstance(state, KVCache)
        heads, kv_heads, size = self._heads
        q = _affine(x, self._q).reshape(-1, heads, size)
        k = _affine(x, self._k).reshape(-1, kv_heads, size)
        v = _affine(x, self._v).reshape(-1, kv_heads, size)
        for rows, weight in ((q, self._q_norm), (k, self._k_norm)):
            loops().head_norm_rotary(rows, weight, self._eps, step.cos, step.sin)
        state.store(step.index.slot_mapping, torch.from_numpy(k), torch.from_numpy(v))
        out, shift, jobs = np.empty_like(q), step.index.kv_shift, []
        for n, past in enumerate(step.pasts):
            rows = slice(step.bounds[n], step.bounds[n + 1])
            keys, values, table = _paged(state, step.tables[n], shift + past + step.lengths[n])
            for head in range(kv_heads):
                jobs.append(
                    partial(loops().attention, q[rows], keys, values, table, shift + past, shift,
                            np.float32(size**-0.5), out[rows], head, head + 1)
                )  # fmt: skip
        together(jobs)
        if self._gate is not None:
            loops().gate_heads(out, _affine(x, self._gate).reshape(out.shape))
        return _affine(out.reshape(len(x), -1), self._o)


class Mlp:
    """SwiGLU MLP."""

    def __init__(self, mlp: MLP) -> None:
        self._up = matrix(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        self._down = matrix(mlp.down_proj.weight)

    def __call__(self, x: Array) -> Array:
        """(T, H) -> (T, H)."""
        act = np.empty((len(x), self._down.shape[0]), np.float32)
        loops().swiglu(product(x, self._up), act)
        return product(act, self._down)


class Moe:
    """Sparse mixture of experts (spec section 5)."""

    def __init__(self, moe: SparseMoe) -> None:
        self._gate = matrix(moe.gate.weight)
        self._up, self._down = matrix(moe.experts.gate_up_proj), matrix(moe.experts.down_proj)
        self._shared: Mlp | None = None
        if moe.shared_expert is not None and moe.shared_expert_gate is not None:
            self._shared = Mlp(moe.shared_expert)
            self._shared_gate = matrix(moe.shared_expert_gate.weight)
        self._top_k, self._norm = moe.top_k, moe.norm_topk_prob

    def __call__(self, x: Array) -> Array:
        """(T, H) -> (T, H)."""
        weights = np.empty((len(x), self._top_k), np.float32)
        ids = np.empty(weights.shape, np.int64)
        loops().route(product(x, self._gate), self._norm, weights, ids)
        flat, num = ids.ravel(), len(self._down)
        order = flat.argsort(kind="stable")
        ends = np.bincount(flat, minlength=num).cumsum()
        y = np.empty((len(flat), x.shape[1]), np.float32)
        # Experts with about the same number of rows for each thread.
        cuts = np.searchsorted(ends, np.linspace(0, len(flat), threads() + 1)[1:-1]).tolist()
        pairs = zip([0, *cuts], [*cuts, num], strict=True)
        together(
            partial(loops().experts, x, order, ends, self._up, self._down, y, *pair)
            for pair in pairs
        )
        out = np.zeros_like(x)
        loops().mix(y.reshape(len(x), self._top_k, -1), weights, out)
        if self._shared is not None:
            loops().add_gated(self._shared(x), product(x, self._shared_gate), out)
        return out


class StrictPending(Pending):
    """Provisional rows whose replay has the bits of the strict loops."""

    def replay(self, rows: slice | Tensor, cu_seqlens: Tensor, start: Tensor) -> Tensor:
        """See ``Pending.replay``."""
        k, v = self.k[rows], self.v[rows]
        qkv = torch.cat([k.flatten(1), k.flatten(1), v.flatten(1)], 1).numpy()
        g, beta = (np.ascontiguousarray(x[rows].numpy()) for x in (self.g, self.beta))
        state, out = start.clone(), np.empty(v.shape, np.float32)
        delta_rule(qkv, g, beta, cu_seqlens.numpy(), state.numpy(), out, k.shape[1])
        return state


def _affine(x: Array, parts: tuple[Array, Array | None]) -> Array:
    weight, bias = parts
    out = product(x, weight)
    return out if bias is None else out + bias


def _paged(state: KVCache, table: Array, total: int) -> tuple[Array, Array, Array]:
    """Keys, values and block table of one sequence; other dtypes than fp32 as an fp32 copy."""
    if state.k.dtype == torch.float32:
        return state.k.numpy(), state.v.numpy(), table
    blocks = torch.from_numpy(table[: -(-total // state.k.shape[1])])
    keys, values = (part[blocks].float().numpy() for part in (state.k, state.v))
    return keys, values, np.arange(len(blocks), dtype=np.int32)


def _vector(weight: Tensor) -> Array:
    return weight.detach().float().contiguous().numpy()


def _bias(bias: Tensor | None) -> Array | None:
    return None if bias is None else _vector(bias).ravel()


def matrix(weight: Tensor) -> Array:
    """(..., out, in) transposed for the loops: bfloat16 bits where that loses nothing."""
    turned = weight.detach().transpose(-2, -1)
    half = turned.bfloat16()
    if torch.equal(half.float(), turned.float()):
        return half.contiguous().view(torch.uint16).numpy()
    return turned.float().contiguous().numpy()


def _norm_weight(norm: RMSNorm) -> Array:
    weight = _vector(norm.weight)
    return weight + np.float32(1) if norm.zero_centred else weight
