"""The Triton norms in Triton's interpreter against their formulas in fp64."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
import torch.nn.functional as F

from qnext.kernels.norm import triton as norm

EPS = 1e-3  # large enough that a misplaced eps shows


def scaled(x):
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def error(got, want):
    got, want = got.detach().double(), want.detach()
    return float((got - want).norm() / want.norm())


def compare(mine, formula, inputs, limit):
    """Outputs and all gradients of ``mine`` against ``formula`` in fp64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    wants = [x.detach().double().requires_grad_() for x in inputs]
    got, want = mine(*leaves), formula(*wants)
    gen = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=gen).to(x.dtype) for x in got]
    for a, b, x in zip(got, want, grads, strict=True):
        assert a.dtype == inputs[0].dtype
        assert a.shape == b.shape == x.shape
        assert error(a, b) < limit
    got = torch.autograd.grad(got, leaves, grads)
    want = torch.autograd.grad(want, wants, [x.double() for x in grads])
    for a, b, leaf in zip(got, want, leaves, strict=True):
        assert a.dtype == leaf.dtype
        assert error(a, b) < limit


@pytest.mark.parametrize("shape", [(3, 96), (2, 5, 64), (1, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(shape, dtype):
    gen = torch.Generator().manual_seed(0)

    def normal(*shape):
        return (torch.randn(*shape, generator=gen) * 0.1).to(dtype)

    limit = 2e-6 if dtype == torch.float32 else 8e-3
    x, z, w = normal(*shape), normal(*shape) * 20, normal(shape[-1])
    compare(
        lambda x, w: (norm.rms_norm(x, w, EPS),), lambda x, w: (scaled(x) * (1 + w),), (x, w), limit
    )
    compare(
        lambda x, z, w: (norm.gated_rms_norm(x, z, w, EPS),),
        lambda x, z, w: (scaled(x) * w * F.silu(z),),
        (x, z, w),
        limit,
    )
    compare(
        lambda x, r, w: norm.add_rms_norm(x, r, w, EPS),
        lambda x, r, w: (scaled(x + r) * (1 + w), x + r),
        (x, z, w),
        limit,
    )


def test_many_rows_share_one_weight_gradient(monkeypatch):
    monkeypatch.setattr(norm, "NUMBERS", 32)
    monkeypatch.setattr(norm, "BACKWARD_PROGRAMS", 2)
    x, w = torch.randn(11, 24)[:, :16], torch.randn(16)
    compare(
        lambda x, w: (norm.rms_norm(x, w, EPS),),
        lambda x, w: (scaled(x) * (1 + w),),
        (x, w),
        2e-6,
    )
