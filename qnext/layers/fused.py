"""Decoder layers on a CPU through compiled loops; same results, fewer steps.

``fuse(model)`` gives the model a :class:`FusedModel`, which it uses where that fits (cached rows,
fp32, no gradients); everywhere else the layers run as they are. Few rows are decoded in loops
here; prompts go through ``qnext.layers.fused_prefill``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qnext.kernels import small_batch
from qnext.kernels.select import usable
from qnext.layers.decoder import DecoderLayer
from qnext.layers.fused_prefill import MIN_STRETCH, WideModel
from qnext.layers.model import CausalLM
from qnext.layers.moe import SparseMoe
from qnext.layers.norm import RMSNorm
from qnext.layers.packed import PackedBatch
from qnext.layers.state import DeltaState, KVCache, ModelState

MANY_ROWS = 64
"""Rows up to which the head runs in the loops."""


def fuse(model: CausalLM, *, half: bool = False) -> bool:
    """Give a model the fused path, if it and this machine can use it.

    The loops keep copies of the weights: fuse again after changing them.

    Args:
        model: to change.
        half: let the products of prompts round their inputs to BF16, where the weights lose
            nothing by it and the processor multiplies BF16 (AVX512-BF16). Sums, states and
            everything else stay fp32; docs/numerics.md says how far logits move.

    Returns:
        Whether it was given.
    """
    if not usable("numba") or model.device.type != "cpu" or model.dtype != torch.float32:
        return False
    if model.config.attention_bias:  # no published model of these families has biases
        return False
    if any(p.dtype != torch.float32 for p in model.parameters()):  # quantised weights
        return False
    model.fused = FusedModel(model, half and _half_is_exact(model))
    return True


def _half_is_exact(model: CausalLM) -> bool:
    """Whether this machine multiplies BF16 and every matrix of the layers is BF16 anyway."""
    from qnext.kernels.tiles.tile import has_bfloat16

    if not has_bfloat16():
        return False
    layers = [model.model.layers, *([model.mtp] if model.mtp is not None else [])]
    matrices = [p for part in layers for p in part.parameters() if p.ndim > 1]
    return all(torch.equal(p.bfloat16().float(), p) for p in matrices)


class FusedModel:
    """All layers of a model for cached sequences, fp32 and no gradients.

    Args:
        model: whose weights to copy.
        half: whether prompts multiply in BF16.
    """

    def __init__(self, model: CausalLM, half: bool) -> None:
        from qnext.kernels.small_batch import loops

        self.half = half
        self._make_wide = partial(WideModel, model, half)
        self._final, self._module = model.model.norm, model.mtp

        self._loops = loops
        self._norm = (_norm(model.model.norm), model.model.norm.eps)
        self._layers = [FusedLayer(layer) for layer in model.model.layers]
        self._mtp: FusedLayer | None = None
        if model.mtp is not None:
            mtp = model.mtp
            self._mtp = FusedLayer(mtp.layers[0])
            self._mix = (_norm(mtp.pre_fc_norm_embedding), _norm(mtp.pre_fc_norm_hidden),
                         _matrix(mtp.fc.weight))  # fmt: skip
            self._mtp_norm = (_norm(mtp.norm), mtp.norm.eps)
        head = model.lm_head if model.lm_head is not None else model.model.embed_tokens
        self._head = _matrix(head.weight)
        self._rotary = model.rotary
        self._table = np.empty((2, 0, 0), np.float32)

    @staticmethod
    def fits(rows: int, state: ModelState | None = None, batch: PackedBatch | None = None) -> bool:
        """Whether these rows are for the loops; without a batch, for those of few rows."""
        if not rows or torch.is_grad_enabled():
            return False
        if batch is None or batch.index is None or state is None:
            return batch is None and rows <= MANY_ROWS
        if FusedModel._few(rows, batch):
            return state.plain
        # Drafts among prompts, and snapshots of a few rows, are for torch.
        wide = rows >= MIN_STRETCH * len(batch.lengths) and not any(batch.index.provisional)
        return wide and state.plain

    @cached_property
    def wide(self) -> WideModel:
        """For prompts; packed when the first one comes."""
        return self._make_wide()

    @staticmethod
    def _few(rows: int, batch: PackedBatch) -> bool:
        """Whether these rows are for the loops of few rows a sequence, which take no snapshots."""
        assert batch.index is not None
        few = rows <= small_batch.MAX_ROWS or rows < MIN_STRETCH * len(batch.lengths)
        return few and not any(part.saves for part in batch.index.rounds)

    def run(
        self,
        h: Tensor,
        batch: PackedBatch,
        state: ModelState,
        wanted: Sequence[int] | None = None,
    ) -> Tensor:
        """All decoder layers and the final norm: embeddings (T, hidden) -> (T, hidden)."""
        if not self._few(len(h), batch):
            found = self.wide.run(h, batch, state, wanted)
            if wanted is None:
                return self._final(found)
            chosen = list(wanted)
            found[chosen] = self._final(found[chosen])
            return found
        step = self._step(batch)
        rows = np.array(h.numpy(), order="C")  # updated in place
        pairs = list(zip(self._layers, state.layers, strict=True))
        kept = [layer.room(step, held) for layer, held in pairs]

        def run(part: slice, step: FusedStep) -> None:
            own = rows[part]
            for (layer, held), room in zip(pairs, kept, strict=True):
                layer(own, step, held, [array[part] for array in room])
            self._loops.rms_norm(own, *self._norm, own)

        self._in_parts(step, run)
        for held, room in zip(state.layers, kept, strict=True):
            if isinstance(held, DeltaState):
                held.pending, held.replay = [], step.replay(room, held)
        return torch.from_numpy(rows)

    def _in_parts(self, step: FusedStep, run: Callable[[slice, FusedStep], None]) -> None:
        """Share sequences out over threads: none looks at another's rows."""
        threads = torch.get_num_threads() if len(step.cos) > small_batch.MAX_ROWS else 1
        (first, *others) = step.split(threads)
        jobs = [_pool(threads).submit(run, *part) for part in others]
        run(*first)
        for job in jobs:
            job.result()

    def run_mtp(
        self, embedded: Tensor, hidden: Tensor, batch: PackedBatch, state: ModelState
    ) -> Tensor:
        """The MTP module: embeddings of the next tokens and hidden states -> (T, hidden)."""
        assert self._mtp is not None
        assert state.mtp is not None
        if not self._few(len(hidden), batch):
            assert self._module is not None
            mixed = self._module.mix(embedded, hidden)
            return self._module.norm(self.wide.run_mtp(mixed, batch, state))
        embed_norm, hidden_norm, fc = self._mix
        eps = self._mtp_norm[1]
        both = np.empty((len(hidden), fc.shape[0]), np.float32)
        width = hidden.shape[1]
        self._loops.rms_norm(embedded.numpy(), embed_norm, eps, both[:, :width])
        self._loops.rms_norm(
            np.ascontiguousarray(hidden.numpy()), hidden_norm, eps, both[:, width:]
        )
        rows = np.empty((len(hidden), width), np.float32)
        module, cache = self._mtp, state.mtp

        def run(part: slice, step: FusedStep) -> None:
            own = rows[part]
            self._loops.linear(both[part], fc, own)
            module(own, step, cache, [])
            self._loops.rms_norm(own, *self._mtp_norm, own)

        self._in_parts(self._step(batch), run)
        return torch.from_numpy(rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, hidden) -> (T, vocab)."""
        rows = np.ascontiguousarray(hidden.numpy())
        out = np.empty((len(hidden), self._head.shape[1]), np.float32)
        threads = torch.get_num_threads() if len(rows) > small_batch.MAX_ROWS else 1
        cuts = [len(rows) * i // threads for i in range(threads + 1)]
        # Not torch's product: its threads go on spinning where ours are to run next.
        jobs = [
            _pool(threads).submit(self._loops.linear, rows[a:b], self._head, out[a:b])
            for a, b in pairwise(cuts[1:])
        ]
        self._loops.linear(rows[: cuts[1]], self._head, out[: cuts[1]])
        for job in jobs:
            job.result()
        return torch.from_numpy(out)

    def _step(self, batch: PackedBatch) -> FusedStep:
        positions = batch.positions.numpy()
        last = int(positions.max())
        if last >= self._table.shape[1]:
            span = torch.arange(max(1024, 2 * last))
            self._table = torch.stack(self._rotary(span, torch.float32)).numpy()
        index = batch.index
        assert index is not None
        return FusedStep(
            batch.cu_seqlens.numpy(), np.array(index.slots), index.block_tables.numpy(),
            np.array(batch.context_lens), index.kv_shift, self._table[0, positions],
            self._table[1, positions], np.array(index.provisional),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class FusedStep:
    """A packed batch as arrays: where the past of each sequence is, cos and sin of every row."""

    bounds: Any
    slots: Any
    tables: Any
    pasts: Any
    shift: int
    cos: Any
    sin: Any
    provisional: Any

    def split(self, count: int) -> list[tuple[slice, FusedStep]]:
        """Up to ``count`` runs of sequences with about equally many rows each, and their rows."""
        if count == 1:
            return [(slice(0, len(self.cos)), self)]
        marks = np.linspace(0, len(self.cos), count + 1)
        ends = sorted({int(np.argmin(abs(self.bounds - mark))) for mark in marks})
        parts = []
        for a, b in pairwise(ends):
            rows = slice(int(self.bounds[a]), int(self.bounds[b]))
            part = FusedStep(
                self.bounds[a : b + 1] - self.bounds[a], self.slots[a:b],
                self.tables[a:b], self.pasts[a:b], self.shift, self.cos[rows], self.sin[rows],
                self.provisional[a:b],
            )  # fmt: skip
            parts.append((rows, part))
        return parts

    def replay(self, kept: list[Any], state: DeltaState) -> Callable[[Sequence[int]], None] | None:
        """Advances a state over accepted rows, from the arrays of ``FusedLayer.room``."""
        if not kept:
            return None
        from qnext.kernels.small_batch import loops

        recurrent, conv = state.recurrent_state.numpy(), state.conv_state.numpy()
        where = (self.bounds, self.slots, self.provisional, conv, recurrent)

        def run(accepted: Sequence[int]) -> None:
            loops.replay(*kept, *where, np.array(accepted))

        return run


class FusedLayer:
    """One decoder layer's weights as arrays, and the two calls that run it."""

    def __init__(self, layer: nn.Module) -> None:
        from qnext.kernels.small_batch import loops

        assert isinstance(layer, DecoderLayer)
        self._loops = loops
        self._eps = layer.input_layernorm.eps
        self._mixer_norm = _norm(layer.input_layernorm)
        if layer.kind == "linear_attention":
            m = layer.linear_attn
            names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
            self._mixer: tuple[Any, ...] = (
                _matrix(torch.cat([getattr(m, name).weight for name in names])),
                np.ascontiguousarray(_array(m.conv1d.weight.squeeze(1)).T),
                -np.exp(_array(m.A_log)),
                _array(m.dt_bias),
                _array(m.norm.weight),
                _matrix(m.out_proj.weight),
            )
            self._shape = (m.num_k_heads, m.head_k_dim, m.head_v_dim)
        else:
            a = layer.self_attn
            self._mixer = (
                _matrix(torch.cat([p.weight for p in (a.q_proj, a.k_proj, a.v_proj)])),
                _norm(a.q_norm),
                _norm(a.k_norm),
                _matrix(a.o_proj.weight),
            )
            self._gated = a.gated
        self._mlp_norm = _norm(layer.post_attention_layernorm)
        mlp = layer.mlp
        self._sparse = isinstance(mlp, SparseMoe)
        if isinstance(mlp, SparseMoe):
            gate = _matrix(mlp.gate.weight)
            shared: tuple[Any, ...] = (gate[:0],) * 4
            if mlp.shared_expert is not None and mlp.shared_expert_gate is not None:
                parts = (mlp.shared_expert.gate_proj, mlp.shared_expert.up_proj,
                         mlp.shared_expert.down_proj, mlp.shared_expert_gate)  # fmt: skip
                shared = tuple(_matrix(p.weight) for p in parts)
            self._mlp: tuple[Any, ...] = (
                gate,
                _matrix(mlp.experts.gate_up_proj),
                _matrix(mlp.experts.down_proj),
                *shared,
            )
            self._route = (mlp.top_k, mlp.norm_topk_prob)
        else:
            self._mlp = tuple(
                _matrix(p.weight) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
            )

    def room(self, step: FusedStep, state: KVCache | DeltaState) -> list[Any]:
        """Arrays k, v, g, beta, qkv for what provisional rows leave behind; none without any."""
        if not isinstance(state, DeltaState) or not step.provisional.any():
            return []
        key_heads, dk, dv = self._shape
        heads, channels, rows = len(self._mixer[3]), state.conv_state.shape[1], len(step.cos)
        shapes = ((key_heads, dk), (heads, dv), (heads,), (heads,), (channels,))
        return [np.empty((rows, *shape), np.float32) for shape in shapes]

    def __call__(
        self, rows: Any, step: FusedStep, state: KVCache | DeltaState, kept: list[Any]
    ) -> None:
        """Run the layer on (T, hidden) in place; the state advances as in the layer itself."""
        if isinstance(state, DeltaState):
            self._delta_net(rows, step, state, kept)
        else:
            self._loops.attention(
                rows, self._mixer_norm, *self._mixer, self._eps, self._gated, step.cos, step.sin,
                step.bounds, step.tables, step.pasts, step.shift, state.k.numpy(),
                state.v.numpy(),
            )  # fmt: skip
        if self._sparse:
            self._loops.moe(rows, self._mlp_norm, *self._mlp, self._eps, *self._route)
        else:
            self._loops.mlp(rows, self._mlp_norm, *self._mlp, self._eps)

    def _delta_net(self, rows: Any, step: FusedStep, state: DeltaState, kept: list[Any]) -> None:
        recurrent, conv = state.recurrent_state.numpy(), state.conv_state.numpy()
        key_heads, dk, dv = self._shape
        heads, channels = recurrent.shape[1], conv.shape[1]
        if not kept:
            shapes = ((0, key_heads, dk), (0, heads, dv), (0, heads), (0, heads), (0, channels))
            kept = [np.empty(shape, np.float32) for shape in shapes]
        k, v, g, beta, qkv = kept
        self._loops.delta_net(
            rows, self._mixer_norm, *self._mixer, self._eps, *self._shape, step.bounds,
            step.slots, conv, recurrent, step.provisional, qkv, k, v, g, beta,
        )  # fmt: skip


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="qnext-sequences")


def _array(weight: Tensor) -> Any:
    return weight.detach().contiguous().numpy()


def _matrix(weight: Tensor) -> Any:
    """(..., out, in) transposed for the loops: bfloat16 bits where that loses nothing."""
    turned = weight.detach().transpose(-2, -1)
    half = turned.bfloat16()
    if torch.equal(half.float(), turned):
        return half.contiguous().view(torch.uint16).numpy()
    return _array(turned)


def _norm(norm: RMSNorm) -> Any:
    weight = _array(norm.weight)
    return weight + np.float32(1) if norm.zero_centred else weight
