"""FP8 norms and the delta rule's inputs of prefill, in the interpreter, against torch."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import torch.nn.functional as F

from qnext.kernels.causal_conv import triton_heads
from qnext.kernels.causal_conv.reference import causal_conv
from qnext.kernels.linear.quantised import fp8_linear, quantise, restore
from qnext.kernels.linear.reference import dequantise
from qnext.kernels.norm import reference, triton_prefill

#: Error of FP8 rows here. The interpreter drops a carry into the exponent (0.99 becomes 0.5), so
#: that it is about twice the 0.026 of right rounding; the GPU benchmark holds the tighter limit.
FP8_ERROR = 0.08


def relative(out, want):
    return float((out.double() - want.double()).norm() / want.double().norm())


def test_quantised_rows_come_back_within_a_step():
    torch.manual_seed(0)
    x = torch.randn(5, 384) * torch.tensor([1e-6, 1, 10, 1e4, 0])[:, None]
    small, scales = quantise(x)
    assert scales.shape == (3, 5)
    error = (restore(small, scales) - x).abs().unflatten(1, (3, 128)).amax(-1)
    assert (error <= 16 * scales.t()).all()  # half of the coarsest step of e4m3


def test_fp8_linear_is_the_product_of_what_the_numbers_stand_for():
    torch.manual_seed(0)
    x, w = torch.randn(8, 256), torch.randn(384, 256).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2) + 0.5
    small, scales = quantise(x)
    got = fp8_linear(small, scales, w, scale, torch.float32)
    want = restore(small, scales).double() @ dequantise(w, scale, torch.float64).T
    assert relative(got, want) < 1e-5


@pytest.mark.parametrize(("rows", "width", "add"), [(3, 256, True), (5, 384, False)])
def test_norm_quantised(rows, width, add):
    torch.manual_seed(0)
    x, w = torch.randn(rows, width + 8)[:, :width], torch.randn(width) * 0.1
    residual = torch.randn(rows, width) if add else None
    total, normed, small, scales = triton_prefill.norm_quantised(x, w, 1e-6, residual)
    want = x if residual is None else x + residual
    assert torch.equal(total, want)
    assert relative(normed, reference.rms_norm(want, w, 1e-6)) < 1e-6
    assert relative(scales, quantise(normed)[1]) < 1e-6
    assert relative(restore(small, scales), normed) < FP8_ERROR
    assert len(triton_prefill.norm_quantised(x, w, 1e-6, residual, keep=False)[1]) == 0


def test_gated_norm_quantised():
    torch.manual_seed(0)
    x, w = torch.randn(37, 2, 128), torch.randn(128)
    z = torch.randn(37, 300)[:, :256]
    small, scales = triton_prefill.gated_norm_quantised(x, z, w, 1e-6)
    want = reference.gated_rms_norm(x, z.reshape(37, 2, 128), w, 1e-6).flatten(1)
    assert relative(scales, quantise(want)[1]) < 1e-5
    assert relative(restore(small, scales), want) < FP8_ERROR


@pytest.mark.parametrize("initial", [True, False])
def test_delta_inputs(initial):
    torch.manual_seed(0)
    hk, hv, d, lengths = 2, 4, 16, [1, 70, 2]
    tokens, channels = sum(lengths), (2 * hk + hv) * d
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    wide = torch.randn(tokens, channels + 2 * hv)
    qkv, ba = wide.split([channels, 2 * hv], 1)
    weight, a_log, dt = torch.randn(channels, 4), torch.randn(hv), torch.randn(hv)
    window = torch.randn(3, channels, 3) if initial else None
    got = triton_heads.delta_inputs(
        qkv, ba, weight, a_log, dt, cu, window, key_heads=hk, value_heads=hv
    )
    mixed, end = causal_conv(qkv, weight, cu, window)
    q, k, v = mixed.split([hk * d, hk * d, hv * d], 1)
    q, k = (x.view(tokens, hk, d) for x in (q, k))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    assert relative(got.q, q * d**-0.5) < 1e-6
    assert relative(got.k, k) < 1e-6
    assert relative(got.v, v.view(tokens, hv, d)) < 1e-6
    assert torch.equal(got.window, end)
    assert relative(got.beta, ba[:, :hv].sigmoid()) < 1e-6
    assert relative(got.g, -a_log.exp() * F.softplus(ba[:, hv:] + dt)) < 1e-5
