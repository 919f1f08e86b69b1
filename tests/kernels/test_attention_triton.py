"""Triton decode attention in the interpreter, against spec section 3 written in torch."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from qnext.errors import KernelError
from qnext.kernels.attention import decode_attention, reference, triton_decode

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


@pytest.mark.parametrize("where", ["reference", "triton"])
@pytest.mark.parametrize(
    ("new", "context", "splits", "size"),
    [(1, [37, 0], 4, 16), (3, [15, 60], 2, 8), (9, [31, 5], 8, 32), (2, [33, 64], 4, 64)],
)
def test_equals_the_formula_and_writes_the_cache(where, new, context, splits, size):
    torch.manual_seed(new)
    n, rows, width = len(context), len(context) * new, 96 // size + 1
    qkv = torch.randn(rows, HEADS * 2 * D + 2 * KV * D)
    q_norm, k_norm = torch.randn(2, D) * 0.1
    position = (torch.tensor(context)[:, None] + torch.arange(new)).reshape(-1, 1)
    angle = position * 1e4 ** (-torch.arange(ROT // 2) / (ROT / 2))
    rotary = torch.cat([angle.cos(), angle.sin()], 1)
    blocks = n * width + 3
    k_cache, v_cache = torch.randn(2, blocks, size, KV, D)
    tables = torch.randperm(blocks)[: n * width].view(n, width).to(torch.int32)
    old_k, old_v = k_cache.clone(), v_cache.clone()
    args = (qkv, q_norm, k_norm, rotary, k_cache, v_cache, tables)
    lens = torch.tensor(context, dtype=torch.int32)
    if where == "reference":
        out = reference.decode_attention(*args, lens, heads=HEADS)
    else:
        buffers = triton_decode.workspace(n, new, HEADS, KV, D, splits, "cpu")
        for buffer in buffers:
            buffer.fill_(float("nan"))
        out = torch.full((rows, HEADS * D), float("nan"))
        triton_decode.decode_attention(
            *args, lens, heads=HEADS, splits=splits, out=out, buffers=buffers, block=16
        )
    kept = torch.ones(blocks, size, dtype=torch.bool)
    for i, past in enumerate(context):
        at = torch.arange(past + new)
        cells = (tables[i].long()[at // size], at % size)
        kept[cells[0][past:], cells[1][past:]] = False
        part = slice(i * new, (i + 1) * new)
        olds = (c[cells[0][:past], cells[1][:past]].transpose(0, 1) for c in (old_k, old_v))
        want, keys, values = formula(qkv[part], q_norm, k_norm, rotary[part], *olds, past)
        torch.testing.assert_close(out[part], want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(k_cache[cells].transpose(0, 1), keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(v_cache[cells].transpose(0, 1), values)
    assert torch.equal(k_cache[kept], old_k[kept])
    assert torch.equal(v_cache[kept], old_v[kept])


def test_quantised_output_is_the_same_output():
    torch.manual_seed(0)
    heads, kv, d = 2, 1, 128
    qkv = torch.randn(2, heads * 2 * d + 2 * kv * d)
    caches, tables = torch.randn(2, 4, 16, kv, d), torch.tensor([[3, 1], [0, 2]]).int()
    args = (qkv, *torch.randn(2, d) * 0.1, torch.rand(2, 8), *caches, tables, torch.tensor([9, 20]))
    plain = triton_decode.decode_attention(*args, heads=heads, splits=2, block=16)
    small = torch.empty(2, heads * d, dtype=torch.float8_e4m3fn)
    scale = torch.full((2, heads), float("nan"))
    triton_decode.decode_attention(
        *args, heads=heads, splits=2, block=16, out=small, out_scale=scale
    )
    wide = small.float().view(2, heads, d) * scale[..., None]
    near = (wide.flatten(1) - plain).abs() < plain.abs() / 16 + 1e-3
    assert near.float().mean() > 0.95
    assert torch.allclose(scale, plain.view(2, heads, d).abs().amax(-1) / 448, rtol=1e-3)


def test_ragged_rows_are_named():
    with pytest.raises(KernelError) as caught:
        decode_attention(
            torch.zeros(3, 8), *[torch.zeros(1)] * 5, torch.zeros(2, 1), torch.zeros(2), heads=1
        )
    assert caught.value.hint


@pytest.mark.parametrize(
    ("sequences", "context", "splits"),
    [(1, 1024, 16), (1, 262144, 128), (8, 1024, 16), (256, 64, 1)],
)
def test_splits(sequences, context, splits):
    assert triton_decode.splits_for(sequences, 2, context) == splits
