"""GatedDeltaNet: the linear-attention mixer (spec section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qnext.config import ModelConfig
from qnext.kernels.causal_conv import causal_conv
from qnext.kernels.gated_delta import chunk_gated_delta_rule, recurrent_gated_delta_rule
from qnext.layers.norm import GatedRMSNorm
from qnext.layers.packed import CacheIndex, PackedBatch
from qnext.layers.state import DeltaState, Pending


class GatedDeltaNet(nn.Module):
    """Short convolution, gated delta rule, gated norm.

    The four input projections are contiguous by head (Qwen3.5's names); checkpoints of
    Qwen3-Next store them interleaved per key head as ``in_proj_qkvz`` and ``in_proj_ba``, and
    the weight rules permute the rows.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_k_heads = config.linear_num_key_heads
        self.num_v_heads = config.linear_num_value_heads
        self.head_k_dim = config.linear_key_head_dim
        self.head_v_dim = config.linear_value_head_dim
        self.key_dim = self.num_k_heads * self.head_k_dim
        self.value_dim = self.num_v_heads * self.head_v_dim
        width = config.hidden_size
        self.in_proj_qkv = nn.Linear(width, 2 * self.key_dim + self.value_dim, bias=False)
        self.in_proj_z = nn.Linear(width, self.value_dim, bias=False)
        self.in_proj_b = nn.Linear(width, self.num_v_heads, bias=False)
        self.in_proj_a = nn.Linear(width, self.num_v_heads, bias=False)
        self.conv1d = DepthwiseConv(
            2 * self.key_dim + self.value_dim, config.linear_conv_kernel_dim
        )
        self.A_log = nn.Parameter(torch.zeros(self.num_v_heads))
        self.dt_bias = nn.Parameter(torch.ones(self.num_v_heads))
        self.norm = GatedRMSNorm(self.head_v_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(self.value_dim, width, bias=False)

    def forward(self, x: Tensor, batch: PackedBatch, state: DeltaState | None) -> Tensor:
        """(T, hidden) -> (T, hidden); ``state`` is read and advanced if there is one."""
        qkv, z = self.in_proj_qkv(x), self.in_proj_z(x)
        beta, g = self.gates(self.in_proj_b(x), self.in_proj_a(x))
        if state is None or batch.index is None:
            mixed, _ = causal_conv(qkv, self.conv1d.weight.squeeze(1), batch.cu_seqlens)
            q, k, v = self._heads(mixed)
            out, _ = chunk_gated_delta_rule(q, k, v, g, beta, batch.cu_seqlens)
        else:
            out = self._cached(qkv, g, beta, batch.index, state)
        out = self.norm(out, z.view(len(x), self.num_v_heads, -1))
        return self.out_proj(out.reshape(len(x), -1))

    def _cached(
        self, qkv: Tensor, g: Tensor, beta: Tensor, index: CacheIndex, state: DeltaState
    ) -> Tensor:
        """Advance the slots round by round: (T, C), (T, Hv), (T, Hv) -> (T, Hv, dv)."""
        whole = len(index.rounds) == 1
        out = qkv.new_empty(0 if whole else len(qkv), self.num_v_heads, self.head_v_dim)
        state.pending = []
        for part in index.rounds:
            rows, slots = part.rows, part.slots
            inputs, window = qkv[rows], state.conv_state[slots]
            mixed, window = causal_conv(
                inputs, self.conv1d.weight.squeeze(1), part.cu_seqlens, window
            )
            q, k, v = self._heads(mixed)
            rule = recurrent_gated_delta_rule if part.short else chunk_gated_delta_rule
            start, decay, write = state.recurrent_state[slots], g[rows], beta[rows]
            found, end, *_ = rule(q, k, v, decay, write, part.cu_seqlens, start)
            if whole:
                out = found
            else:
                out[rows] = found
            if part.provisional:
                state.pending.append(Pending(part, k, v, decay, write, inputs))
                continue
            state.recurrent_state[slots] = end.to(state.recurrent_state.dtype)
            state.conv_state[slots] = window.to(state.conv_state.dtype)
            for slot, snapshot in part.saves:
                state.copy(slot, snapshot)
        return out

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, C) after the convolution -> q, k (T, Hk, dk) normalised, v (T, Hv, dv)."""
        q, k, v = mixed.split([self.key_dim, self.key_dim, self.value_dim], -1)
        q = l2_normalise(q.view(len(mixed), self.num_k_heads, -1)) * self.head_k_dim**-0.5
        k = l2_normalise(k.view(len(mixed), self.num_k_heads, -1))
        return q, k, v.view(len(mixed), self.num_v_heads, -1)

    def gates(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Write strength beta and log decay g, (T, Hv) fp32 each (spec section 4.3)."""
        wide = torch.float64 if b.dtype == torch.float64 else torch.float32
        decay = -self.A_log.to(wide).exp()
        return b.sigmoid().to(wide), decay * F.softplus(a.to(wide) + self.dt_bias.to(wide))


class DepthwiseConv(nn.Module):
    """Holds ``conv1d.weight`` (C, 1, K), the checkpoint's shape; the op does the work."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, taps))


def l2_normalise(x: Tensor) -> Tensor:
    """Divide by ``sqrt(sum(x^2) + 1e-6)`` over the last axis; fp32 inside and out.

    The epsilon is inside the root and on the sum (spec section 11.4).
    """
    wide = x if x.dtype == torch.float64 else x.float()
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)
