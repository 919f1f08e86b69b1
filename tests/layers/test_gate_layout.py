"""q_proj holds, head by head, a query and then a gate (spec 3.1), shown by indexed rows."""

from __future__ import annotations

import torch
from tiny import tiny_model

from qnext.layers.packed import PackedBatch


def test_every_gate_channel_opens_its_own_output_channel() -> None:
    model = tiny_model()
    layer, c = model.model.layers[1].self_attn, model.config
    heads, dim = c.num_attention_heads, c.head_dim
    rows = torch.arange(heads * 2 * dim, dtype=torch.float64)
    x = torch.zeros(1, c.hidden_size, dtype=torch.float64)
    x[0, 0] = 1.0
    layer.q_proj.weight.zero_()[:, 0] = rows / 100  # q_proj(x) = its row numbers / 100
    layer.v_proj.weight.zero_()[:, 0] = 1.0  # one token attends to itself: values are all one
    layer.o_proj = torch.nn.Identity()
    batch = PackedBatch.of([1])
    out = layer(x, batch, model.rotary(batch.positions, x.dtype), None)
    expected = [
        torch.sigmoid((2 * dim * h + dim + torch.arange(dim, dtype=torch.float64)) / 100)
        for h in range(heads)
    ]
    torch.testing.assert_close(out[0], torch.cat(expected), rtol=0, atol=1e-12)
