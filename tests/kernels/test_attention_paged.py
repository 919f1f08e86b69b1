"""Attention over a paged cache: reference, Triton in the interpreter, and the pieces around it."""

from __future__ import annotations

import os
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from qnext.kernels.attention import cudnn, paged, paged_attention, triton_prefill
from qnext.kernels.linear.quantised import quantise, restore
from qnext.kernels.norm.reference import rms_norm
from qnext.kernels.rotary import apply_rotary

H, HKV, D, BLOCK = 4, 2, 32, 8


def relative(out, want):
    return float((out.double() - want.double()).norm() / want.double().norm())


def cached(lengths, past, shift=0):
    """Random caches in shuffled blocks, and the same keys and values as plain rows."""
    torch.manual_seed(0)
    totals = [a + b for a, b in zip(lengths, past, strict=True)]
    counts = [-(-(total + shift) // BLOCK) for total in totals]
    order = torch.randperm(sum(counts) + 3)
    k_cache = torch.full((len(order), BLOCK, HKV, D), float("nan"))
    v_cache = k_cache.clone()
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    rows, start = [], 0
    for n, (total, count) in enumerate(zip(totals, counts, strict=True)):
        blocks = order[start : start + count]
        start += count
        tables[n, :count] = blocks
        k, v = torch.randn(2, total, HKV, D)
        for p in range(total):
            k_cache[blocks[(p + shift) // BLOCK], (p + shift) % BLOCK] = k[p]
            v_cache[blocks[(p + shift) // BLOCK], (p + shift) % BLOCK] = v[p]
        rows.append((k, v))
    return k_cache, v_cache, tables, rows


def formula(q, rows, lengths, past):
    out, start = [], 0
    for (k, v), new, old in zip(rows, lengths, past, strict=True):
        part = q[start : start + new].double()
        start += new
        keys = k.double().repeat_interleave(H // HKV, 1)
        values = v.double().repeat_interleave(H // HKV, 1)
        scores = torch.einsum("thd,shd->hts", part, keys) * 0.3
        hidden = torch.arange(new + old)[None, :] > old + torch.arange(new)[:, None]
        scores = scores.masked_fill(hidden, float("-inf"))
        out.append(torch.einsum("hts,shd->thd", scores.softmax(-1), values))
    return torch.cat(out)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("triton", [False, True])
def test_ragged_sequences_with_a_cached_prefix(monkeypatch, triton, shift):
    lengths, past = [1, 2, 19, 16, 5], [13, 9, 0, 24, 0]
    k_cache, v_cache, tables, rows = cached(lengths, past, shift)
    q = torch.randn(sum(lengths), H, D)
    args = (q, k_cache, v_cache, tables, past, lengths, 0.3, shift)
    if triton:
        whole = triton_prefill.attend_paged
        monkeypatch.setattr(triton_prefill, "attend_paged", partial(whole, config=(16, 16, 1, 1)))
        out = paged.paged_attention(*args)
    else:
        out = paged_attention(*args)
    assert relative(out, formula(q, rows, lengths, past)) < 1e-6


def plain_sdpa(q, k, v, scale, causal):
    """What cuDNN is asked for, in torch."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(len(q), len(k)).triu(1).bool(), float("-inf"))
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize(("new", "past", "shift"), [(16, 0, 0), (24, 13, 1), (43, 29, 0)])
def test_pieces_of_powers_of_two(monkeypatch, new, past, shift):
    lengths = set()

    def sdpa(q, k, v, scale, causal):
        lengths.add((len(q), len(k)))
        return plain_sdpa(q, k, v, scale, causal)

    monkeypatch.setattr(cudnn, "sdpa", sdpa)
    monkeypatch.setattr(cudnn, "LONGEST", 16)
    monkeypatch.setattr(cudnn, "SHORTEST", 8)
    whole = triton_prefill.attend_paged
    monkeypatch.setattr(triton_prefill, "attend_paged", partial(whole, config=(16, 16, 1, 1)))
    k_cache, v_cache, tables, rows = cached([new], [past], shift)
    q = torch.randn(new, H, D)
    out = cudnn.attend(q, k_cache, v_cache, tables[0], past, 0.3, shift)
    assert relative(out, formula(q, rows, [new], [past])) < 1e-6
    assert all(n & (n - 1) == 0 for pair in lengths for n in pair)


def test_merge_of_disjoint_keys_is_attention_over_both():
    torch.manual_seed(0)
    tokens, width = 5, 128
    q = torch.randn(tokens, 2, width)

    def attention(k, v):
        scores = torch.einsum("thd,shd->hts", q, k) * 0.1
        out = torch.einsum("hts,shd->thd", scores.softmax(-1), v)
        return out, scores.logsumexp(-1)

    k, v = torch.randn(2, 30, 2, width)
    want, lse = attention(k, v)
    both = attention(k[:11], v[:11]), attention(k[11:], v[11:])
    out, _, got_lse = triton_prefill.merge(*both)
    assert relative(out, want.flatten(1)) < 1e-6
    assert relative(got_lse, lse) < 1e-6
    projections = torch.randn(tokens, 2 * 2 * width + 7)
    gate = projections[:, : 4 * width].unflatten(1, (2, 2, width))[:, :, 1]
    gated = (want * gate.sigmoid()).flatten(1)
    assert relative(triton_prefill.merge(*both, projections)[0], gated) < 1e-6
    assert relative(triton_prefill.merge((want, None), None, projections)[0], gated) < 1e-6
    small, scales, _ = triton_prefill.merge(*both, projections, quantised=True)
    assert relative(scales, quantise(gated)[1]) < 1e-5
    assert relative(restore(small, scales), gated) < 0.08  # see test_prefill_norms


def test_projections_become_queries_and_cache_rows():
    torch.manual_seed(0)
    tokens, rot = 21, 16
    qkv = torch.randn(tokens, H * 2 * D + 2 * HKV * D)
    q_norm, k_norm = torch.randn(2, D) * 0.1
    angle = torch.rand(tokens, rot // 2) * 6
    rotary = torch.cat([angle.cos(), angle.sin()], 1)
    k_cache = torch.full((5, BLOCK, HKV, D), float("nan"))
    v_cache = k_cache.clone()
    rows = torch.randperm(5 * BLOCK)[:tokens]
    q = triton_prefill.store_qkv(qkv, q_norm, k_norm, rotary, rows, k_cache, v_cache, H, 1e-6)
    cos, sin = angle.cos(), angle.sin()
    heads = qkv[:, : H * 2 * D].view(tokens, H, 2 * D)[..., :D]
    assert relative(q, apply_rotary(rms_norm(heads, q_norm, 1e-6), cos, sin)) < 1e-5
    k, v = qkv[:, H * 2 * D :].view(tokens, 2, HKV, D).unbind(1)
    want = apply_rotary(rms_norm(k, k_norm, 1e-6), cos, sin)
    assert relative(k_cache.flatten(0, 1)[rows], want) < 1e-5
    assert torch.equal(v_cache.flatten(0, 1)[rows], v)
    assert int(k_cache.isnan().any(-1).any(-1).sum()) == 5 * BLOCK - tokens
