"""The small kernels around the FP8 streams of decoding, in the interpreter, against torch."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from qnext.errors import KernelError
from qnext.kernels.experts import triton_route
from qnext.kernels.gated_delta.triton_decode import fused_decode_ring
from qnext.kernels.gated_delta.triton_verify import fused_verify_ring, verify_buffers
from qnext.kernels.norm.triton_quantise import add_norm_quantise

FP8 = torch.float8_e4m3fn


def widen(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (q.float().unflatten(-1, (-1, 128)) * scale[..., None]).flatten(-2)


@pytest.mark.parametrize("terms", [0, 3])
@pytest.mark.parametrize("extra", [False, True])
def test_add_norm_quantise(terms, extra):
    torch.manual_seed(terms)
    t, h = 3, 384
    hidden, weight = torch.randn(t, h), torch.randn(h) * 0.1
    parts = torch.randn(terms, t, h) if terms else None
    more = torch.randn(t, h) if extra and terms else None
    want = hidden.clone()
    if terms:
        want += parts.sum(0)
    if more is not None:
        want += more
    norm = want * torch.rsqrt(want.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + weight)
    normed, q = torch.full((t, h), float("nan")), torch.empty(t, h, dtype=FP8)
    scale, zero = torch.full((t, h // 128), float("nan")), torch.full((8,), 7, dtype=torch.int32)
    add_norm_quantise(
        hidden, weight, normed, q, scale, parts=None if parts is None else parts.transpose(0, 1),
        extra=more, zero=zero,
    )  # fmt: skip
    torch.testing.assert_close(hidden, want)
    torch.testing.assert_close(normed, norm)
    assert not zero.any()
    torch.testing.assert_close(scale, norm.view(t, -1, 128).abs().amax(-1) / 448)
    exact = (norm.view(t, -1, 128) / scale[..., None]).to(FP8).float() * scale[..., None]
    # the interpreter drops the carry where rounding reaches the next power of two
    assert (widen(q, scale) == exact.flatten(1)).float().mean() > 0.95


@pytest.mark.parametrize("norm_topk", [True, False])
@pytest.mark.parametrize(("tokens", "parts"), [(1, 1), (20, 4)])
def test_route_lists_every_choice_once(tokens, parts, norm_topk):
    torch.manual_seed(tokens)
    e, top, tile = 16, 3, 4
    logits = torch.randn(parts, tokens, e + 1)
    out = triton_route.buffers(tokens, top, e, tile, "cpu")
    triton_route.route_tasks(logits, out, top_k=top, bf16=False, norm_topk_prob=norm_topk)
    total = logits.sum(0)
    weights, ids = total[:, :e].softmax(-1).topk(top, -1)
    if norm_topk:
        weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(out["weights"].view(tokens, top), weights)
    torch.testing.assert_close(out["gates"], total[:, e].sigmoid())
    counts = out["counts"]
    assert torch.equal(counts[:e].long(), ids.flatten().bincount(minlength=e))
    for expert in range(e):
        mine = out["lists"][expert, : counts[expert]].long()
        assert sorted(mine.tolist()) == (ids.flatten() == expert).nonzero()[:, 0].tolist()
    tasks = out["tasks"][: counts[e]].tolist()
    wanted = [(i, s) for i in range(e) for s in range(0, int(counts[i]), tile)]
    assert sorted((task & 0xFFFF, task >> 16) for task in tasks) == sorted(wanted)


def test_fused_decode_takes_terms_of_the_gates_and_quantises():
    torch.manual_seed(0)
    n, hk, hv, d = 2, 1, 2, 128
    c = 2 * hk * d + hv * d
    wide = torch.randn(2, n, c + hv * d)
    b, a = torch.randn(2, 3, n, hv)
    ring, taps = torch.randn(n, c, 4), torch.randn(c, 4) * 0.5
    rest = (torch.rand(hv), torch.rand(hv), torch.rand(d) + 0.5)
    state = torch.randn(n, hv, d, d) * 0.1
    slots, lens = torch.arange(n, dtype=torch.int32), torch.full((n,), 5, dtype=torch.int32)
    plain = fused_decode_ring(
        *wide.sum(0).split([c, hv * d], -1),
        b.sum(0),
        a.sum(0),
        ring.clone(),
        taps,
        *rest,
        state.clone(),
        slots,
        lens,
        1e-6,
    )
    q = torch.empty(n, hv * d, dtype=FP8)
    scale = torch.full((n, hv), float("nan"))
    fused_decode_ring(
        *wide.split([c, hv * d], -1), b, a, ring, taps, *rest, state, slots, lens, 1e-6, out=q,
        scale=scale,
    )  # fmt: skip
    assert ((widen(q, scale) - plain).abs() < plain.abs() / 16 + 1e-3).float().mean() > 0.95
    torch.testing.assert_close(scale, plain.view(n, hv, d).abs().amax(-1) / 448)


@pytest.mark.parametrize("tile", [32, 16])
def test_verify_replays_what_was_accepted(tile):
    """Steps of 3 rows with 3, 1 and 2 accepted give what token by token gives on those rows."""
    torch.manual_seed(1)
    n, hk, hv, d, rows = 2, 1, 2, 32, 3
    c = 2 * hk * d + hv * d
    taps, rest = torch.randn(c, 4) * 0.5, (torch.rand(hv), torch.rand(hv), torch.rand(d) + 0.5)
    slots = torch.tensor([1, 0], dtype=torch.int32)
    state, ring = torch.randn(2, hv, d, d) * 0.1, torch.zeros(2, c, 8)
    plain_state, plain_ring = state.clone(), torch.zeros(2, c, 4)
    kept = verify_buffers(2, hv, d, rows, "cpu")
    position, accepted = 11, torch.zeros(n, dtype=torch.int32)
    for count in (3, 1, 2):
        x = torch.randn(n * rows, c)
        z, b, a = torch.randn(n * rows, hv * d), *torch.randn(2, n * rows, hv)
        lens = torch.full((n,), position, dtype=torch.int32)
        out = fused_verify_ring(
            x, z, b, a, ring, taps, *rest, state, slots, lens, accepted, kept, 1e-6, tile=tile
        )
        torch.testing.assert_close(state, plain_state, rtol=1e-4, atol=1e-5)
        at = torch.arange(n) * rows
        for r in range(count):
            want = fused_decode_ring(
                x[at + r], z[at + r], b[at + r], a[at + r], plain_ring, taps, *rest, plain_state,
                slots, lens + r, 1e-6,
            )  # fmt: skip
            torch.testing.assert_close(out[at + r], want, rtol=1e-4, atol=1e-5)
        position += count
        accepted.fill_(count)


def test_too_small_a_ring_is_named():
    with pytest.raises(KernelError) as caught:
        fused_verify_ring(
            torch.zeros(9, 128), torch.zeros(9, 64), *[torch.zeros(9, 2)] * 2,
            torch.zeros(1, 128, 8), torch.zeros(128, 4), *[torch.zeros(2)] * 3,
            torch.zeros(1, 2, 32, 32), torch.zeros(1), torch.zeros(1), torch.zeros(1),
            verify_buffers(1, 2, 32, 9, "cpu"), 1e-6,
        )  # fmt: skip
    assert caught.value.hint


def test_projections_in_parts_are_named():
    with pytest.raises(KernelError) as caught:
        fused_verify_ring(
            torch.zeros(2, 3, 128), torch.zeros(2, 3, 64), *[torch.zeros(3, 2)] * 2,
            torch.zeros(1, 128, 8), torch.zeros(128, 4), *[torch.zeros(2)] * 3,
            torch.zeros(1, 2, 32, 32), torch.zeros(1), torch.zeros(1), torch.zeros(1),
            verify_buffers(1, 2, 32, 3, "cpu"), 1e-6,
        )  # fmt: skip
    assert "split" in caught.value.hint
