"""Triton decode attention in the interpreter, against spec section 3 written in torch."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from qnext.kernels.attention import triton_decode

HEADS, KV, D, ROT = 4, 2, 32, 8


def norm(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + w)


def rotate(x, table):
    cos, sin = (t[:, None] for t in table.chunk(2, -1))
    a, b, rest = x[..., : ROT // 2], x[..., ROT // 2 : ROT], x[..., ROT:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def formula(qkv, q_norm, k_norm, rotary, keys, values, past):
    """One sequence: qkv (R, ...), keys and values (Hkv, past, D)."""
    r = qkv.shape[0]
    query_gate = qkv[:, : HEADS * 2 * D].view(r, HEADS, 2 * D)
    k, v = qkv[:, HEADS * 2 * D :].view(r, 2, KV, D).unbind(1)
    q = rotate(norm(query_gate[..., :D], q_norm), rotary)
    k = rotate(norm(k, k_norm), rotary)
    keys, values = (
        torch.cat([keys, k.transpose(0, 1)], 1),
        torch.cat([values, v.transpose(0, 1)], 1),
    )
    wide = [t.repeat_interleave(HEADS // KV, 0) for t in (keys, values)]
    scores = torch.einsum("rhd,htd->hrt", q, wide[0]) * D**-0.5
    hidden = torch.arange(past + r)[None] > past + torch.arange(r)[:, None]
    p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    out = torch.einsum("hrt,htd->rhd", p, wide[1]) * query_gate[..., D:].sigmoid()
    return out.reshape(r, -1), keys, values


@pytest.mark.parametrize(
    ("new", "context", "splits"), [(1, [37, 0], 4), (3, [15, 60], 2), (9, [31, 5], 8)]
)
def test_equals_the_formula_and_writes_the_cache(new, context, splits):
    torch.manual_seed(new)
    n, rows = len(context), len(context) * new
    qkv = torch.randn(rows, HEADS * 2 * D + 2 * KV * D)
    q_norm, k_norm = torch.randn(2, D) * 0.1
    position = (torch.tensor(context)[:, None] + torch.arange(new)).reshape(-1, 1)
    angle = position * 1e4 ** (-torch.arange(ROT // 2) / (ROT / 2))
    rotary = torch.cat([angle.cos(), angle.sin()], 1)
    k_cache, v_cache = torch.randn(2, 3, KV, 96, D)
    old_k, old_v, slots = k_cache.clone(), v_cache.clone(), [2, 0]
    buffers = triton_decode.workspace(n, new, HEADS, KV, D, splits, "cpu")
    for buffer in buffers:
        buffer.fill_(float("nan"))
    out = torch.full((rows, HEADS * D), float("nan"))
    triton_decode.decode_attention(
        qkv, q_norm, k_norm, rotary, k_cache, v_cache, torch.tensor(slots, dtype=torch.int32),
        torch.tensor(context, dtype=torch.int32), heads=HEADS, splits=splits, out=out,
        buffers=buffers, block=16,
    )  # fmt: skip
    for i, (slot, past) in enumerate(zip(slots, context, strict=True)):
        part = slice(i * new, (i + 1) * new)
        want, keys, values = formula(
            qkv[part], q_norm, k_norm, rotary[part], old_k[slot, :, :past],
            old_v[slot, :, :past], past,
        )  # fmt: skip
        torch.testing.assert_close(out[part], want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(k_cache[slot, :, : past + new], keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(v_cache[slot, :, : past + new], values)
        assert torch.equal(k_cache[slot, :, past + new :], old_k[slot, :, past + new :])
    assert torch.equal(k_cache[1], old_k[1])


@pytest.mark.parametrize(
    ("sequences", "context", "splits"), [(1, 1024, 32), (1, 262144, 64), (8, 1024, 8), (256, 64, 1)]
)
def test_splits(sequences, context, splits):
    assert triton_decode.splits_for(sequences, 2, context) == splits
