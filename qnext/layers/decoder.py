"""One decoder layer: pre-norm, mixer, pre-norm, MLP or MoE (spec section 5, layer wiring)."""

from __future__ import annotations

from torch import Tensor, nn

from qnext.config import ModelConfig
from qnext.layers.attention import GatedAttention
from qnext.layers.delta_net import GatedDeltaNet
from qnext.layers.mlp import MLP
from qnext.layers.moe import RouterStats, SparseMoe
from qnext.layers.norm import RMSNorm
from qnext.layers.packed import PackedBatch
from qnext.layers.state import DeltaState, KVCache


class DecoderLayer(nn.Module):
    """``h = h + mixer(norm(h)); h = h + mlp(norm(h))``.

    The mixer is an attribute named as in the checkpoint: ``self_attn`` or ``linear_attn``.
    """

    def __init__(self, config: ModelConfig, kind: str, sparse: bool) -> None:
        super().__init__()
        self.kind = kind
        if kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = GatedAttention(config)
        self.mlp: SparseMoe | MLP
        if sparse:
            self.mlp = SparseMoe(config)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        eps, zero = config.rms_norm_eps, config.zero_centred_norms
        self.input_layernorm = RMSNorm(config.hidden_size, eps, zero)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps, zero)

    def forward(
        self,
        h: Tensor,
        batch: PackedBatch,
        rotary: tuple[Tensor, Tensor],
        state: KVCache | DeltaState | None = None,
        stats: RouterStats | None = None,
    ) -> Tensor:
        """(T, hidden) -> (T, hidden)."""
        x = self.input_layernorm(h)
        if self.kind == "linear_attention":
            assert not isinstance(state, KVCache)
            h = h + self.linear_attn(x, batch, state)
        else:
            assert not isinstance(state, DeltaState)
            h = h + self.self_attn(x, batch, rotary, state)
        x = self.post_attention_layernorm(h)
        if isinstance(self.mlp, SparseMoe):
            return h + self.mlp(x, stats)
        return h + self.mlp(x)
