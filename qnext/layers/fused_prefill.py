"""Decoder layers for many rows on a CPU through register tiles and compiled loops.

``WideModel`` runs the layers of a model for a packed batch with a cache: prompts. Rows are shared
out over threads; a layer waits for all of them twice, before and after its mixer looks across
rows. Products round their inputs to BF16 where that was asked for, everything else is fp32.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qnext.layers.decoder import DecoderLayer
from qnext.layers.mlp import MLP
from qnext.layers.model import CausalLM
from qnext.layers.moe import SparseMoe
from qnext.layers.norm import RMSNorm
from qnext.layers.packed import CacheIndex, PackedBatch
from qnext.layers.state import DeltaState, KVCache, ModelState

MIN_STRETCH = 6
"""Rows per sequence, on average, from which the tiles pay."""

Part = Callable[[int, int], None]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="qnext-rows")


class WideModel:
    """All layers of a model for prompts: cached sequences, fp32 states, no gradients.

    Args:
        model: fp32 on a CPU.
        half: whether products take BF16 inputs.
    """

    def __init__(self, model: CausalLM, half: bool) -> None:
        self._layers = [WideLayer(layer, half) for layer in model.model.layers]
        self._mtp: WideLayer | None = None
        if model.mtp is not None:
            self._mtp = WideLayer(model.mtp.layers[0], half)
        self._rotary = model.rotary
        self._turns = np.empty((2, 0, 0), np.float32)

    def run(
        self, h: Tensor, batch: PackedBatch, state: ModelState, wanted: Sequence[int] | None
    ) -> Tensor:
        """All decoder layers, without the final norm: embeddings (T, hidden) -> (T, hidden).

        Rows that are not ``wanted`` (None: all are) leave the last layer half done.
        """
        return self._run(self._layers, h, batch, state.layers, wanted)

    def run_mtp(self, x: Tensor, batch: PackedBatch, state: ModelState) -> Tensor:
        """The decoder layer of the MTP module: (T, hidden) -> (T, hidden)."""
        assert self._mtp is not None
        assert state.mtp is not None
        return self._run([self._mtp], x, batch, [state.mtp])

    def _run(
        self,
        layers: list[WideLayer],
        h: Tensor,
        batch: PackedBatch,
        states: list[Any],
        wanted: Sequence[int] | None = None,
    ) -> Tensor:
        from qnext.kernels.tiles import product

        width = h.shape[1]
        rows = np.zeros((len(h), product.vectors_of(width) * 16), np.float32)
        rows[:, :width] = h.detach().numpy()
        step = WideStep.of(batch, rows, self._cos_sin(batch.positions))
        every = list(pairwise(step.bounds))
        spans = every if wanted is None else _spans(wanted, step.bounds)
        after: Part | None = None
        for layer, state in zip(layers, states, strict=True):
            last = layer is layers[-1]
            before, mix, after_mix = layer.parts(step, state, spans if last else every)
            step.over_rows(_both(after, before))
            for part in mix:
                step.run(part)
            after = after_mix
        assert after is not None
        if wanted is None:
            step.over_rows(after)
        else:
            step.run([partial(after, begin, end) for begin, end in spans])
        return torch.from_numpy(rows[:, :width])

    def _cos_sin(self, positions: Tensor) -> Any:
        """(2, T, R) cosines and sines, from a table that grows with the longest text."""
        longest = int(positions.max()) + 1
        if longest > self._turns.shape[1]:
            span = torch.arange(-(-longest // 4096) * 4096)
            self._turns = torch.stack(self._rotary(span, torch.float32)).numpy()
        return self._turns[:, positions.numpy()]


def _spans(rows: Sequence[int], bounds: tuple[int, ...]) -> list[tuple[int, int]]:
    """Neighbouring rows of one sequence as (first, last + 1)."""
    starts, found = set(bounds), list[tuple[int, int]]()
    for row in sorted(set(rows)):
        if found and found[-1][1] == row and row not in starts:
            found[-1] = (found[-1][0], row + 1)
        else:
            found.append((row, row + 1))
    return found


def _both(first: Part | None, second: Part) -> Part:
    """The end of one layer and the start of the next need no wait between them."""
    if first is None:
        return second

    def run(begin: int, end: int) -> None:
        first(begin, end)
        second(begin, end)

    return run


@dataclass(slots=True)
class WideStep:
    """A packed batch as arrays, the hidden states, and the threads.

    Attributes:
        rows: (T, hidden up to whole vectors) updated in place.
        bounds: N + 1 bounds of the sequences.
        new_places: (T,) rows of the new tokens in the flattened KV blocks.
        places: for every sequence, rows of all its tokens there, past and new.
        stretches: see ``kernels.tiles.delta.heads``.
        cos: (T, R).
        sin: (T, R).
        threads: how many.
    """

    rows: Any
    bounds: tuple[int, ...]
    new_places: Any
    places: list[Any]
    stretches: Any
    cos: Any
    sin: Any
    threads: int

    @classmethod
    def of(cls, batch: PackedBatch, rows: Any, cos_sin: Any) -> WideStep:
        """Work out everything that the layers share."""
        index = batch.index
        assert index is not None
        tables, places = index.block_tables.numpy(), []
        for n, (past, new) in enumerate(zip(batch.context_lens, batch.lengths, strict=True)):
            place = np.arange(index.kv_shift, index.kv_shift + past + new)
            if tables.shape[1]:
                size = index.block_size
                place = tables[n, place // size].astype(np.int64) * size + place % size
            places.append(place)
        bounds = tuple(batch.cu_seqlens.tolist())
        return cls(
            rows, bounds, index.slot_mapping.numpy(), places, _stretches(index, bounds),
            cos_sin[0], cos_sin[1], torch.get_num_threads(),
        )  # fmt: skip

    def over_rows(self, part: Part) -> None:
        """Run on an even share of rows in every thread."""
        count, threads = len(self.rows), self.threads
        cuts = [count * i // threads for i in range(threads + 1)]
        self.run([partial(part, cuts[i], cuts[i + 1]) for i in range(threads)])

    def run(self, jobs: list[Callable[[], None]]) -> None:
        """Run all jobs, some of them here, and wait."""
        shares = [jobs[i :: self.threads] for i in range(min(self.threads, len(jobs)))]
        waiting = [_pool(self.threads).submit(_all, share) for share in shares[1:]]
        try:
            _all(shares[0])
        finally:
            for share in waiting:
                share.result()


def _all(jobs: list[Callable[[], None]]) -> None:
    for job in jobs:
        job()


class WideLayer:
    """One decoder layer's packed weights, and the parts that run it."""

    def __init__(self, layer: nn.Module, half: bool) -> None:
        from qnext.kernels.tiles import attention, delta, mlp, product

        assert isinstance(layer, DecoderLayer)
        self._attention, self._delta, self._mlp_loops = attention, delta, mlp
        self._product = product
        self._kind = np.uint16 if half else np.float32
        self._eps = layer.input_layernorm.eps
        self._norm = _norm(layer.input_layernorm)
        if layer.kind == "linear_attention":
            m = layer.linear_attn
            names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
            into = torch.cat([getattr(m, name).weight for name in names])
            self._out_columns, out = m.value_dim, m.out_proj.weight
            self._rule = (
                np.ascontiguousarray(_array(m.conv1d.weight.squeeze(1)).T),
                -np.exp(_array(m.A_log)), _array(m.dt_bias), _array(m.norm.weight), self._eps,
                m.num_k_heads, m.head_k_dim, m.head_v_dim,
            )  # fmt: skip
            self._heads = m.num_v_heads
        else:
            a = layer.self_attn
            into = torch.cat([p.weight for p in (a.q_proj, a.k_proj, a.v_proj)])
            self._out_columns, out = a.num_heads * a.head_dim, a.o_proj.weight
            self._heads, self._kv_heads, self._dim = a.num_heads, a.num_kv_heads, a.head_dim
            self._per_head = a.head_dim * (2 if a.gated else 1)
            self._head_norms = (_norm(a.q_norm), _norm(a.k_norm))
        self._into, self._into_vectors = self._pack(into), product.vectors_of(len(into))
        self._out, self._out_vectors = self._pack(out), product.vectors_of(len(out))
        self._mlp = self._pack_mlp(layer)

    def _pack_mlp(self, layer: DecoderLayer) -> tuple[Any, ...]:
        """Everything that the MLP loops take after the rows."""
        mlp, norm = layer.mlp, _norm(layer.post_attention_layernorm)
        none, nothing = np.empty((0, 0), self._kind), np.empty(0, self._kind)
        routed: tuple[Any, ...] = (np.empty(0, np.float32), 0, none, none, 0, 1, False)
        shared: tuple[Any, ...] = (nothing, nothing, 0, np.empty(0, np.float32))
        dense = mlp if isinstance(mlp, MLP) else mlp.shared_expert
        if isinstance(mlp, SparseMoe):
            inner = mlp.experts.down_proj.shape[2]
            routed = (
                self._pack(mlp.gate.weight, np.float32), len(mlp.gate.weight),
                np.stack([self._pack(w) for w in mlp.experts.gate_up_proj]),
                np.stack([self._pack(w) for w in mlp.experts.down_proj]),
                inner, mlp.top_k, mlp.norm_topk_prob,
            )  # fmt: skip
        if dense is not None:
            scale = np.empty(0, np.float32)
            if isinstance(mlp, SparseMoe) and mlp.shared_expert_gate is not None:
                scale = _array(mlp.shared_expert_gate.weight[0])
            shared = (
                self._pack(torch.cat([dense.gate_proj.weight, dense.up_proj.weight])),
                self._pack(dense.down_proj.weight), dense.down_proj.weight.shape[1], scale,
            )  # fmt: skip
        return (norm, self._eps, *routed, *shared)

    def _pack(self, weight: Tensor, kind: Any = None) -> Any:
        """(out, in) packed for products."""
        kind = self._kind if kind is None else kind
        pair = 4 // np.dtype(kind).itemsize
        turned = np.ascontiguousarray(_array(weight).T)
        steps, vectors = -(-turned.shape[0] // pair), self._product.vectors_of(turned.shape[1])
        out = np.empty(steps * pair * vectors * 16, kind)
        self._product.pack(turned, pair, out)
        return out

    def parts(
        self, step: WideStep, state: KVCache | DeltaState, spans: list[tuple[int, int]]
    ) -> tuple[Part, list[list[Callable[[], None]]], Part]:
        """What to run over rows first, then (jobs side by side) across rows, then over rows.

        Attention is computed for the rows of ``spans``, each within one sequence.
        """
        h = step.rows
        u = np.empty((len(h), self._into_vectors * 16), np.float32)
        pair = 4 // np.dtype(self._kind).itemsize
        y = np.zeros((len(h), -(-self._out_columns // pair) * pair), self._kind)

        def before(begin: int, end: int) -> None:
            self._product.project(
                h, begin, end, self._norm, self._eps, self._into, self._into_vectors, u
            )
            if isinstance(state, KVCache):
                self._attention.place(
                    u, begin, end, *self._head_norms, self._eps, self._per_head, self._heads,
                    step.cos, step.sin, step.new_places, keys, values,
                )  # fmt: skip

        if isinstance(state, KVCache):
            keys, values = (x.flatten(0, 1).numpy() for x in (state.k, state.v))
            mix = [self._attend(step, spans, u, y, keys, values)]
        else:
            mix = self._run_rule(step, state, u, y)

        def after(begin: int, end: int) -> None:
            self._product.add_product(y, begin, end, self._out, self._out_vectors, h)
            self._mlp_loops.mlp(h, begin, end, *self._mlp)

        return before, mix, after

    def _attend(
        self, step: WideStep, spans: list[tuple[int, int]], u: Any, y: Any, keys: Any, values: Any
    ) -> list[Callable[[], None]]:
        """One job per span of rows and key head, cut further only if threads would idle."""
        pieces = math.ceil(step.threads / (self._kv_heads * len(spans)))
        jobs: list[Callable[[], None]] = []
        for start, stop in spans:
            n = bisect_right(step.bounds, start) - 1
            places, begin = step.places[n], step.bounds[n]
            new = step.bounds[n + 1] - begin
            past, rows = len(places) - new + start - begin, stop - start
            cuts = [start - begin + _cut(past, rows, i, pieces) for i in range(pieces + 1)]
            jobs += [
                partial(
                    self._attention.attend, u, begin, new, first, last, places, keys, values, kv,
                    self._heads, self._per_head, y,
                )
                for kv in range(self._kv_heads)
                for first, last in pairwise(cuts)
            ]  # fmt: skip
        return jobs

    def _run_rule(
        self, step: WideStep, state: DeltaState, u: Any, y: Any
    ) -> list[list[Callable[[], None]]]:
        recurrent, conv = state.recurrent_state.numpy(), state.conv_state.numpy()
        threads = min(step.threads, self._heads)
        cuts = [self._heads * i // threads for i in range(threads + 1)]
        rule: list[Callable[[], None]] = [
            partial(
                self._delta.heads, u, *self._rule, step.stretches, conv, recurrent, y, first, last
            )
            for first, last in pairwise(cuts)
        ]
        return [rule, [partial(self._delta.advance_windows, u, step.stretches, conv)]]


def _stretches(index: CacheIndex, bounds: tuple[int, ...]) -> Any:
    """Rows (first row of the sequence, first, last + 1, slot, snapshot slot or -1), in order."""
    found = []
    for part in index.rounds:
        starts, saves = part.cu_seqlens.tolist(), dict(part.saves)
        rows = part.rows
        for i, n in enumerate(part.members):
            count = starts[i + 1] - starts[i]
            first = rows.start + starts[i] if isinstance(rows, slice) else int(rows[starts[i]])
            slot = index.slots[n]
            found.append((bounds[n], first, first + count, slot, saves.get(slot, -1)))
    return np.array(sorted(found), np.int64).reshape(-1, 5)


def _cut(past: int, new: int, part: int, parts: int) -> int:
    """Row where an even share of the work of causal attention ends."""
    whole = (past + new) ** 2 - past**2
    return round(math.sqrt(past**2 + whole * part / parts)) - past


def _array(weight: Tensor) -> Any:
    return weight.detach().float().contiguous().numpy()


def _norm(norm: RMSNorm) -> Any:
    weight = _array(norm.weight)
    return weight + np.float32(1) if norm.zero_centred else weight
