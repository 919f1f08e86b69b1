"""The multi-token prediction module (spec section 6.1).

From the main model's normed hidden state H_i and the token at i + 1 it predicts the token at
i + 2. Applied again to its own output it drafts further ahead (section 6.2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qnext.config import ModelConfig
from qnext.layers.decoder import DecoderLayer
from qnext.layers.moe import RouterStats
from qnext.layers.norm import RMSNorm
from qnext.layers.packed import PackedBatch
from qnext.layers.state import KVCache


class MTP(nn.Module):
    """``norm(layer(fc([norm(embed(next)), norm(H)])))``; embedding and head are the model's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, eps, zero = config.hidden_size, config.rms_norm_eps, config.zero_centred_norms
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.pre_fc_norm_embedding = RMSNorm(width, eps, zero)
        self.pre_fc_norm_hidden = RMSNorm(width, eps, zero)
        self.layers = nn.ModuleList(
            [DecoderLayer(config, "full_attention", config.num_experts > 0)]
        )
        self.norm = RMSNorm(width, eps, zero)

    def forward(
        self,
        embedded: Tensor,
        hidden: Tensor,
        batch: PackedBatch,
        rotary: tuple[Tensor, Tensor],
        state: KVCache | None = None,
        stats: RouterStats | None = None,
    ) -> Tensor:
        """Embeddings of the next tokens and hidden states, (T, H) each -> (T, H) normed."""
        x = self.mix(embedded, hidden)
        return self.norm(self.layers[0](x, batch, rotary, state, stats))

    def mix(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """What the layer gets: fc of both inputs after their norms."""
        e = self.pre_fc_norm_embedding(embedded)
        c = self.pre_fc_norm_hidden(hidden)
        return self.fc(torch.cat([e, c], -1))
