"""The Triton convolution in Triton's interpreter against a naive fp64 loop."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
import torch.nn.functional as F

from qnext.kernels.causal_conv import triton as conv


def naive(x, weight, bounds, initial):
    """One sequence, one token at a time."""
    taps = weight.shape[1]
    outputs, finals = [], []
    for n in range(len(bounds) - 1):
        window = torch.cat([initial[n].t(), x[bounds[n] : bounds[n + 1]]])
        for t in range(bounds[n + 1] - bounds[n]):
            outputs.append(F.silu((window[t : t + taps] * weight.t()).sum(0)))
        finals.append(window[len(window) - taps + 1 :].t())
    return torch.stack(outputs), torch.stack(finals)


def error(got, want):
    got, want = got.detach().double(), want.detach()
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("bounds", "channels", "taps", "start", "dtype"),
    [
        ([0, 70], 24, 4, False, torch.float32),
        ([0, 2, 2, 7, 8], 70, 4, True, torch.float32),
        ([0, 3, 9], 8, 3, True, torch.bfloat16),
    ],
)
def test_forward_and_gradients(bounds, channels, taps, start, dtype):
    gen = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=gen).to(dtype)

    x = normal(bounds[-1], channels + 8)[:, :channels]  # rows of a wider projection
    weight = normal(channels, taps)
    initial = normal(len(bounds) - 1, channels, taps - 1)
    if not start:
        initial = torch.zeros_like(initial)
    mine = [t.detach().requires_grad_() for t in (x, weight, initial)]
    other = [t.detach().double().requires_grad_() for t in (x, weight, initial)]
    cu = torch.tensor(bounds, dtype=torch.int32)
    y, final = conv.causal_conv(mine[0], mine[1], cu, mine[2] if start else None)
    want_y, want_final = naive(other[0], other[1], bounds, other[2])
    limit = 1e-6 if dtype == torch.float32 else 6e-3
    assert y.dtype == final.dtype == dtype
    assert error(y, want_y) < limit
    assert torch.equal(final.double(), want_final)
    count = 3 if start else 2
    d_y, d_final = normal(*y.shape), normal(*final.shape)
    got = torch.autograd.grad((y, final), mine[:count], (d_y, d_final))
    want = torch.autograd.grad(
        (want_y, want_final), other[:count], (d_y.double(), d_final.double())
    )
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert error(a, b) < limit
