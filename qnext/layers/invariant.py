"""A model whose every row is bitwise the same in any company: batch, pieces, cache, drafts.

``make_invariant(model)`` gives the model an :class:`InvariantModel`, which runs its layers through
the strict loops of ``qnext.kernels.strict``. There a row's own inputs decide every operation and
its order: products sum along channels, attention along the keys of its sequence from the first,
the delta rule goes token by token, and experts are weighed in the order of their rank. Nothing
depends on other rows, on where a prompt was cut, or on the number of threads.

It computes in fp32, whatever 16-bit format the weights have. docs/numerics.md states the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qnext.errors import ConfigError, KernelError
from qnext.kernels.select import usable
from qnext.kernels.strict.threads import product
from qnext.layers.invariant_parts import Layer, Norm, Step, matrix
from qnext.layers.model import CausalLM
from qnext.layers.packed import PackedBatch
from qnext.layers.state import ModelState

Array = Any
TABLE = 256  # positions whose angles are computed together, whoever asks for them


def make_invariant(model: CausalLM) -> None:
    """Let a model compute every row bitwise independently of all others.

    The loops keep copies of the weights: call it again after changing them.

    Raises:
        ConfigError: not on a CPU, without numba, or weights that are not plain 32- or 16-bit.
        KernelError: this machine's compiler does not keep the promise (checked here).
    """
    if model.device.type != "cpu":
        raise ConfigError(
            f"deterministic runs on a CPU, and the model is on {model.device}",
            hint="device='cpu', or leave deterministic off",
        )
    if not usable("numba"):
        raise ConfigError("deterministic needs numba", hint="pip install 'qnext[cpu]'")
    wrong = {str(p.dtype) for p in model.parameters()} - {"torch.float32", "torch.bfloat16"}
    if wrong:
        raise ConfigError(
            f"deterministic covers float32 and bfloat16 weights, found {', '.join(sorted(wrong))}",
            hint="load the checkpoint with dtype='float32'",
        )
    made = InvariantModel(model)
    made.check()
    model.invariant = made


class InvariantModel:
    """All layers of a model in strict loops; the interface is that of ``FusedModel``."""

    def __init__(self, model: CausalLM) -> None:
        self._new_state: Callable[..., ModelState] = model.new_state
        self._layers = [Layer(layer) for layer in model.model.layers]
        self._norm = Norm(model.model.norm)
        head = model.lm_head if model.lm_head is not None else model.model.embed_tokens
        self._head = matrix(head.weight)
        self._mtp: Layer | None = None
        if model.mtp is not None:
            mtp = model.mtp
            self._mtp = Layer(mtp.layers[0])
            self._mix = (Norm(mtp.pre_fc_norm_embedding), Norm(mtp.pre_fc_norm_hidden))
            self._fc = matrix(mtp.fc.weight)
            self._mtp_norm = Norm(mtp.norm)
        self._rotary = model.rotary
        self._angles: dict[int, tuple[Array, Array]] = {}

    def run(
        self,
        h: Tensor,
        batch: PackedBatch,
        state: ModelState | None,
        collect: list[Tensor] | None = None,
    ) -> Tensor:
        """All decoder layers and the final norm: embeddings (T, hidden) -> (T, hidden)."""
        step, state = self._step(batch, state)
        rows = np.array(h.float().numpy(), order="C")  # updated in place
        for layer, part in zip(self._layers, state.layers, strict=True):
            if collect is not None:
                collect.append(torch.from_numpy(rows.copy()).to(h.dtype))
            layer(rows, step, part)
        out = torch.from_numpy(self._norm(rows)).to(h.dtype)
        if collect is not None:
            collect.append(out)
        return out

    def run_mtp(
        self, embedded: Tensor, hidden: Tensor, batch: PackedBatch, state: ModelState | None
    ) -> Tensor:
        """The MTP module: embeddings of the next tokens and hidden states -> (T, hidden)."""
        assert self._mtp is not None
        step, state = self._step(batch, state)
        assert state.mtp is not None
        sides = zip(self._mix, (embedded, hidden), strict=True)
        both = np.concatenate([norm(_rows(x)) for norm, x in sides], 1)
        rows = product(both, self._fc)
        self._mtp(rows, step, state.mtp)
        return torch.from_numpy(self._mtp_norm(rows)).to(hidden.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, hidden) -> (T, vocab) fp32."""
        return torch.from_numpy(product(_rows(hidden), self._head))

    def check(self) -> None:
        """Hold a few rows together against the same rows alone.

        Raises:
            KernelError: they differ in a bit.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(5, self._head.shape[0], generator=generator)
        alone = torch.cat([self.logits(x[i : i + 1]) for i in range(5)])
        if not torch.equal(self.logits(x), alone):
            raise KernelError(
                "the strict loops gave a row other bits in company than alone",
                hint="numba or LLVM reorders sums on this machine; please report it",
            )

    def _step(self, batch: PackedBatch, state: ModelState | None) -> tuple[Step, ModelState]:
        index = batch.index
        pasts: Sequence[int] = batch.context_lens
        if state is None or index is None:  # whole sequences: a cache for this call alone
            state = self._new_state(len(batch.lengths), batch.max_length)
            index = state.batch(batch.lengths, slots=range(len(batch.lengths))).index
            assert index is not None
            pasts = [0] * len(batch.lengths)
        if any(d.recurrent_state.dtype == torch.bfloat16 for d in state.delta_states):
            raise ConfigError(
                "deterministic needs states in float32: a rounded state remembers where a prompt "
                "was cut",
                hint="leave state_dtype at float32",
            )
        cos, sin = self._cos_sin(batch.positions.numpy())
        step = Step(
            index, batch.lengths, pasts, batch.cu_seqlens.numpy(), index.block_tables.numpy(),
            cos, sin,
        )  # fmt: skip
        return step, state

    def _cos_sin(self, positions: Array) -> tuple[Array, Array]:
        """(T, R) cosines and sines; torch computes a block of positions always the same way."""
        blocks = positions // TABLE
        found = []
        for block in np.unique(blocks):
            if block not in self._angles:
                span = torch.arange(block * TABLE, (block + 1) * TABLE)
                cos, sin = self._rotary(span, torch.float32)
                self._angles[int(block)] = (cos.numpy(), sin.numpy())
            found.append(self._angles[int(block)])
        where = np.searchsorted(np.unique(blocks), blocks) * TABLE + positions % TABLE
        return tuple(np.concatenate(side)[where] for side in zip(*found, strict=True))  # type: ignore[return-value]


def _rows(x: Tensor) -> Array:
    return np.ascontiguousarray(x.float().numpy())
