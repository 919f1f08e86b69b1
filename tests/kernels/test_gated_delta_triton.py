"""The Triton delta rule in Triton's interpreter against a naive fp64 recurrence."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.kernels.gated_delta import triton_chunk, triton_recurrent

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}


def naive(q, k, v, g, beta, bounds, state=None):
    """Spec 4.4, one token, one head at a time, in the dtype of the inputs."""
    ratio = v.shape[1] // q.shape[1]
    outputs, finals, states = [], [], []
    for n in range(len(bounds) - 1):
        heads = []
        for h in range(v.shape[1]):
            s = q.new_zeros(q.shape[2], v.shape[2]) if state is None else state[n, h]
            column, trail = [], []
            for t in range(bounds[n], bounds[n + 1]):
                s = g[t, h].exp() * s
                delta = beta[t, h] * (v[t, h] - k[t, h // ratio] @ s)
                s = s + torch.outer(k[t, h // ratio], delta)
                column.append(q[t, h // ratio] @ s)
                trail.append(s)
            heads.append((column, s, trail))
        length = bounds[n + 1] - bounds[n]
        if length:
            outputs.append(torch.stack([torch.stack(c) for c, _, _ in heads], 1))
            states.append(torch.stack([torch.stack(x) for _, _, x in heads], 1))
        finals.append(torch.stack([s for _, s, _ in heads]))
    return torch.cat(outputs), torch.stack(finals), torch.cat(states)


def draw(bounds, hk, hv, dk, dv, dtype, seed=0, start=True):
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    tokens = bounds[-1]
    q = (F.normalize(normal(tokens, hk, dk), dim=-1) * dk**-0.5).to(dtype)
    # keys with a common part: close keys are what makes (I + A)^-1 hard
    k = F.normalize(normal(tokens, hk, dk) + 2 * normal(1, hk, dk), dim=-1).to(dtype)
    v = normal(tokens, hv, dv).to(dtype)
    g = -normal(tokens, hv).abs() * torch.tensor([0.05, 2.0]).repeat(hv)[:hv]
    beta = torch.sigmoid(normal(tokens, hv) + 1)
    state = normal(len(bounds) - 1, hv, dk, dv) * 0.5 if start else None
    return q, k, v, g, beta, state


def error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


@pytest.mark.parametrize(
    ("bounds", "hk", "hv", "dk", "dv", "dtype", "start"),
    [
        ([0, 70], 1, 2, 32, 16, torch.float32, True),
        ([0, 5, 5, 134], 1, 1, 16, 32, torch.float32, True),
        ([0, 64], 2, 2, 16, 64, torch.float16, False),
    ],
)
def test_chunk_forward_and_gradients(bounds, hk, hv, dk, dv, dtype, start):
    inputs = draw(bounds, hk, hv, dk, dv, dtype, start=start)
    mine = [x if x is None else x.clone().requires_grad_() for x in inputs]
    other = [x if x is None else x.double().requires_grad_() for x in inputs]
    cu = torch.tensor(bounds, dtype=torch.int32)
    o, final = triton_chunk.chunk_gated_delta_rule(*mine[:5], cu, mine[5])
    want_o, want_final, _ = naive(*other[:5], bounds, other[5])
    assert o.dtype == dtype
    assert final.dtype == torch.float32
    limit = TOLERANCE[dtype]
    assert error(o, want_o) < limit
    assert error(final, want_final) < limit

    gen = torch.Generator().manual_seed(1)
    d_o = torch.randn(o.shape, generator=gen).to(dtype)
    d_final = torch.randn(final.shape, generator=gen)
    leaves = [x for x in mine if x is not None]
    wants = [x for x in other if x is not None]
    got = torch.autograd.grad((o, final), leaves, (d_o, d_final))
    want = torch.autograd.grad((want_o, want_final), wants, (d_o.double(), d_final.double()))
    errors = [error(a, b) for a, b in zip(got, want, strict=True)]
    assert max(errors) < 2 * limit, errors
    assert [x.dtype for x in got] == [x.dtype for x in leaves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recurrent_and_its_states(dtype):
    bounds = [0, 3, 3, 5]
    inputs = draw(bounds, 2, 4, 32, 64, dtype)
    cu = torch.tensor(bounds, dtype=torch.int32)
    got = triton_recurrent.recurrent_gated_delta_rule(*inputs[:5], cu, inputs[5], True)
    want = naive(*(x.double() for x in inputs[:5]), bounds, inputs[5].double())
    limits = (2e-6 if dtype == torch.float32 else 5e-3, 2e-6, 2e-6)
    for a, b, limit in zip(got, want, limits, strict=True):
        assert error(a, b) < limit


def test_recurrent_slots_are_read_and_written_in_place():
    bounds = [0, 2, 3, 5]
    q, k, v, g, beta, state = draw(bounds, 1, 2, 16, 32, torch.float32)
    cu, slots = torch.tensor(bounds, dtype=torch.int32), torch.tensor([3, 0, -1]).int()
    cache = torch.full((5, 2, 16, 32), 7.0)
    cache[3], cache[0] = state[0], state[1]
    before = cache.clone()
    want, final, trail = naive(q, k, v, g, beta, bounds, state)
    states = torch.empty(5, 2, 16, 32)
    call = (q, k, v, g, beta, cu, cache, slots)
    o = triton_recurrent.recurrent_gated_delta_rule_slots(*call, states=states, update=False)
    assert torch.equal(cache, before)
    assert error(o[:3], want[:3].double()) < 2e-6
    assert error(states[:3], trail[:3].double()) < 2e-6
    triton_recurrent.recurrent_gated_delta_rule_slots(*call)
    assert error(cache[[3, 0]], final[:2].double()) < 2e-6
    assert torch.equal(cache[[1, 2, 4]], before[[1, 2, 4]])


def naive_decode(qkv, z, b, a, conv, taps, a_log, dt, w, state, eps, hk):
    """Spec 4.2 to 4.6 for one token per sequence in fp64; the states are updated in place."""
    heads, dk, dv = state.shape[1:]
    window = torch.cat([conv, qkv.unsqueeze(2)], 2)
    conv.copy_(window[:, :, 1:])
    mixed = F.silu((window * taps).sum(2))
    q, k, v = mixed.split([hk * dk, hk * dk, heads * dv], 1)
    q, k = (x.view(-1, hk, dk) for x in (q, k))
    q = q * (q.square().sum(2, keepdim=True) + 1e-6).rsqrt() * dk**-0.5
    k = k * (k.square().sum(2, keepdim=True) + 1e-6).rsqrt()
    g = -a_log.exp() * F.softplus(a + dt)
    bounds = list(range(len(qkv) + 1))
    o, final, _ = naive(q, k, v.view(-1, heads, dv), g, b.sigmoid(), bounds, state)
    state.copy_(final)
    o = o * (o.square().mean(2, keepdim=True) + eps).rsqrt() * w
    return (o * F.silu(z.view(o.shape))).flatten(1)


@pytest.mark.parametrize(
    ("hk", "hv", "dk", "dv", "dtype", "state_dtype"),
    [
        (2, 4, 32, 16, torch.float32, torch.float32),
        (1, 3, 16, 64, torch.bfloat16, torch.bfloat16),
    ],
)
def test_fused_decode(hk, hv, dk, dv, dtype, state_dtype):
    gen = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    channels, count = 2 * hk * dk + hv * dv, 3
    slots = torch.tensor([4, -1, 1], dtype=torch.int32)
    live = [0, 2]
    wide = normal(count, channels + hv * dv).to(dtype)  # q | k | v | z as one projection
    qkv, z = wide[:, :channels], wide[:, channels:]
    b, a = normal(count, hv).to(dtype), normal(count, hv).to(dtype) * 10
    conv = normal(5, channels, 3).to(dtype)
    taps, w = normal(channels, 4).to(dtype), normal(dv).to(dtype)
    a_log, dt = normal(hv).to(dtype), normal(hv).to(dtype)
    state = normal(5, hv, dk, dv).to(state_dtype)
    rows = slots[live].long()
    want_conv, want_state = conv[rows].double(), state[rows].double()
    want = naive_decode(
        qkv[live].double(), z[live].double(), b[live].double(), a[live].double(), want_conv,
        taps.double(), a_log.double(), dt.double(), w.double(), want_state, 1e-6, hk,
    )  # fmt: skip
    others = [0, 2, 3]
    untouched = conv[others].clone(), state[others].clone()
    got = triton_recurrent.fused_decode(qkv, z, b, a, conv, taps, a_log, dt, w, state, slots, 1e-6)
    assert got.dtype == dtype
    assert error(got[live], want) < (5e-6 if dtype == torch.float32 else 4e-3)
    assert torch.equal(got[1], torch.zeros_like(got[1]))
    assert torch.equal(conv[rows].double(), want_conv)
    assert error(state[rows], want_state) < (2e-6 if state_dtype == torch.float32 else 4e-3)
    assert torch.equal(conv[others], untouched[0])
    assert torch.equal(state[others], untouched[1])
