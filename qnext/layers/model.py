"""CausalLM: embedding, decoder layers, final norm, head, and the MTP module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qnext.config import ModelConfig
from qnext.errors import ConfigError
from qnext.layers.decoder import DecoderLayer
from qnext.layers.moe import RouterStats
from qnext.layers.mtp import MTP
from qnext.layers.norm import RMSNorm
from qnext.layers.packed import PackedBatch
from qnext.layers.rotary import RotaryEmbedding
from qnext.layers.state import DeltaState, KVCache, ModelState

if TYPE_CHECKING:
    from qnext.layers.fused import FusedModel
    from qnext.layers.invariant import InvariantModel


@dataclass(frozen=True)
class CausalLMOutput:
    """What ``CausalLM.forward`` gives.

    Attributes:
        logits: [batch, seq, vocab] for ids [batch, seq]; (T, vocab) for packed ids.
        hidden_states: on request, the embedding, then the output of every layer (the last one
            after the final norm), each shaped like the ids plus the hidden size.
    """

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class Backbone(nn.Module):
    """Embedding, layers and final norm: the part that checkpoints call ``model``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, kind, config.is_sparse(i))
            for i, kind in enumerate(config.layer_types)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.zero_centred_norms)


class CausalLM(nn.Module):
    """Qwen3-Next and its relatives as one module; the config decides what is in it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.rotary = RotaryEmbedding(config)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp: MTP | None = MTP(config) if config.num_mtp_layers else None
        self.fused: FusedModel | None = None
        self.invariant: InvariantModel | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the layers compute in."""
        return self.model.embed_tokens.weight.dtype

    def hidden_states(
        self,
        input_ids: Tensor,
        batch: PackedBatch,
        state: ModelState | None = None,
        *,
        aux: RouterStats | None = None,
        collect: list[Tensor] | None = None,
        wanted: Sequence[int] | None = None,
    ) -> Tensor:
        """Run the backbone.

        Args:
            input_ids: (T,) packed token ids.
            batch: how they are cut into sequences.
            state: what the layers remember; advanced in place.
            aux: collects router statistics for the training losses.
            collect: gets the embedding and every layer's output appended.
            wanted: rows whose result is needed, None for all: others may be anything, which
                saves most of the last layer of a prompt.

        Returns:
            (T, hidden) after the final norm.
        """
        h = self.model.embed_tokens(input_ids)
        if self.invariant is not None and aux is None:
            return self.invariant.run(h, batch, state, collect)
        fused = self.fused if collect is None and aux is None else None
        if fused is not None and fused.fits(len(h), state, batch):
            assert state is not None
            return fused.run(h, batch, state, wanted)
        rotary = self.rotary(batch.positions, h.dtype)
        for i, layer in enumerate(self.model.layers):
            if collect is not None:
                collect.append(h)
            h = layer(h, batch, rotary, state.layers[i] if state is not None else None, aux)
        h = self.model.norm(h)
        if collect is not None:
            collect.append(h)
        return h

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, hidden) normed states -> (T, vocab)."""
        if self.invariant is not None:
            return self.invariant.logits(hidden)
        if self.fused is not None and self.fused.fits(len(hidden)):
            return self.fused.logits(hidden)
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return F.linear(hidden, self.model.embed_tokens.weight)

    def draft_states(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        batch: PackedBatch,
        state: ModelState | None = None,
        *,
        aux: RouterStats | None = None,
    ) -> Tensor:
        """Run the MTP module.

        Args:
            hidden: (T, hidden) normed states H_i, or the module's own last output.
            next_ids: (T,) the tokens at i + 1.
            batch: positions i; its context lengths are those of the MTP cache, whose rows lie one
                place further on (``kv_shift=1``).
            state: holds the MTP cache.
            aux: collects router statistics.

        Returns:
            (T, hidden); ``logits`` of it predicts the tokens at i + 2.

        Raises:
            ConfigError: the model has no MTP module.
        """
        if self.mtp is None:
            raise ConfigError(
                "this checkpoint has no multi-token prediction module",
                hint="run without num_speculative_tokens, or use a checkpoint that keeps mtp.*",
            )
        embedded = self.model.embed_tokens(next_ids)
        if self.invariant is not None and aux is None:
            return self.invariant.run_mtp(embedded, hidden, batch, state)
        if self.fused is not None and self.fused.fits(len(hidden), state, batch):
            assert state is not None
            return self.fused.run_mtp(embedded, hidden, batch, state)
        rotary = self.rotary(batch.positions, hidden.dtype)
        cache = state.mtp if state is not None else None
        return self.mtp(embedded, hidden, batch, rotary, cache, aux)

    def forward(
        self,
        input_ids: Tensor,
        batch: PackedBatch | None = None,
        state: ModelState | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> CausalLMOutput:
        """Logits for ids [batch, seq] (rows are whole sequences), or for packed ids (T,)."""
        shape = input_ids.shape
        if batch is None:
            rows = [shape[-1]] * (shape[0] if input_ids.ndim == 2 else 1)
            batch = PackedBatch.of(rows, device=input_ids.device)
        collect: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.hidden_states(input_ids.flatten(), batch, state, collect=collect)
        logits = self.logits(hidden).view(*shape, -1)
        kept = tuple(h.view(*shape, -1) for h in collect) if collect is not None else None
        return CausalLMOutput(logits, kept)

    def new_state(
        self,
        num_slots: int,
        capacity: int = 0,
        dtype: torch.dtype | None = None,
        *,
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> ModelState:
        """Empty state.

        Args:
            num_slots: sequences and snapshots it can hold.
            capacity: tokens of KV for every slot, where ``num_blocks`` is not given.
            dtype: of convolution inputs and hidden states; default the model's.
            block_size: tokens of a KV block.
            num_blocks: KV blocks in all; they belong to whoever the caller says.
            kv_dtype: of keys and values; default ``dtype``.
            state_dtype: of recurrent states; default fp32 (spec section 11.6).
        """
        c, dtype = self.config, dtype or self.dtype
        place: dict[str, Any] = {"dtype": dtype, "device": self.device}
        if num_blocks is None:
            # One row more than the tokens: the MTP layer stores its rows one place further on.
            num_blocks = num_slots * (capacity // block_size + 1)

        def kv() -> KVCache:
            shape = (num_blocks, block_size, c.num_key_value_heads, c.head_dim)
            k, v = (
                torch.zeros(shape, dtype=kv_dtype or dtype, device=self.device) for _ in range(2)
            )
            return KVCache(k, v)

        def delta() -> DeltaState:
            heads, dk, dv = (
                c.linear_num_value_heads,
                c.linear_key_head_dim,
                c.linear_value_head_dim,
            )
            channels = 2 * c.linear_num_key_heads * dk + heads * dv
            wide = torch.float64 if dtype == torch.float64 else state_dtype or torch.float32
            return DeltaState(
                torch.zeros(num_slots, heads, dk, dv, dtype=wide, device=self.device),
                torch.zeros(num_slots, channels, c.linear_conv_kernel_dim - 1, **place),
            )

        layers = [kv() if kind == "full_attention" else delta() for kind in c.layer_types]
        hidden = torch.zeros(num_slots, c.hidden_size, **place)
        return ModelState(layers, kv() if self.mtp is not None else None, hidden, block_size)
