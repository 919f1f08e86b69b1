"""GatedAttention: the full-attention mixer (spec section 3)."""

from __future__ import annotations

from torch import Tensor, nn

from qnext.config import ModelConfig
from qnext.kernels.attention import paged_attention, varlen_attention
from qnext.kernels.rotary import apply_rotary
from qnext.layers.norm import RMSNorm
from qnext.layers.packed import PackedBatch
from qnext.layers.state import KVCache


class GatedAttention(nn.Module):
    """Grouped-query attention with per-head q/k norms, partial RoPE and an output gate.

    With the gate, each head's rows of ``q_proj`` hold its query and then its gate. Qwen3 has no
    gate (``config.attn_output_gate`` is False).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.gated = config.attn_output_gate
        width, bias = config.hidden_size, config.attention_bias
        q_rows = self.num_heads * self.head_dim * (2 if self.gated else 1)
        kv_rows = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(width, q_rows, bias=bias)
        self.k_proj = nn.Linear(width, kv_rows, bias=bias)
        self.v_proj = nn.Linear(width, kv_rows, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, config.zero_centred_norms)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, config.zero_centred_norms)

    def forward(
        self, x: Tensor, batch: PackedBatch, rotary: tuple[Tensor, Tensor], state: KVCache | None
    ) -> Tensor:
        """(T, hidden) -> (T, hidden); new keys and values go to ``state`` if there is one."""
        tokens = len(x)
        q = self.q_proj(x).view(tokens, self.num_heads, -1)
        gate = None
        if self.gated:
            q, gate = q.chunk(2, -1)
        k = self.k_proj(x).view(tokens, self.num_kv_heads, -1)
        v = self.v_proj(x).view(tokens, self.num_kv_heads, -1)
        q = apply_rotary(self.q_norm(q), *rotary)
        k = apply_rotary(self.k_norm(k), *rotary)
        scale = self.head_dim**-0.5
        if state is None or batch.index is None:
            bounds = batch.cu_seqlens
            out = varlen_attention(q, k, v, bounds, bounds, scale, batch.max_length)
        else:
            state.store(batch.index.slot_mapping, k, v)
            out = paged_attention(
                q, state.k, state.v, batch.index.block_tables, batch.context_lens,
                batch.lengths, scale, batch.index.kv_shift,
            )  # fmt: skip
        if gate is not None:
            out = out * gate.sigmoid()
        return self.o_proj(out.reshape(tokens, -1))
