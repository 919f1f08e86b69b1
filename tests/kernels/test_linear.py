"""The linear op: FP8 dequantisation by hand, and the Triton kernels in the interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from qnext.errors import KernelError
from qnext.kernels.linear import linear, reference
from qnext.kernels.linear import triton as kernels


def relative(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out.double() - ref.double()).norm() / ref.double().norm())


def fp8_weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.rand(-(-n // 128), -(-k // 128)) + 0.5
    return torch.randn(n, k).to(torch.float8_e4m3fn), scale


def test_dequantise_multiplies_each_block_by_its_scale():
    weight = torch.ones(130, 256).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    out = reference.dequantise(weight, scale, torch.float32)
    assert [out[0, 0], out[0, 255], out[129, 0], out[129, 128]] == [1, 2, 3, 4]


def test_reference_norm_and_residual():
    x, w, r = torch.tensor([[3.0, 4.0]]), torch.eye(2), torch.tensor([[10.0, 20.0]])
    norm = torch.tensor([0.0, 1.0])
    out = linear(x, w, norm_weight=norm, eps=0.0, residual=r)
    rms = 12.5**0.5
    torch.testing.assert_close(out, torch.tensor([[10 + 3 / rms, 20 + 8 / rms]]))


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (torch.zeros(4, 8), None),
        (torch.zeros(4, 16).to(torch.float8_e4m3fn), None),
        (torch.zeros(4, 16), torch.ones(1, 1)),
    ],
)
def test_wrong_arguments_are_named(weight, scale):
    with pytest.raises(KernelError) as caught:
        linear(torch.zeros(2, 16), weight, scale)
    assert caught.value.hint


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("config", [(8, 2, 4), (16, 1, 4, 2), (16, 2, 4, 2)])
def test_triton_equals_reference(tokens, fp8, config):
    torch.manual_seed(tokens)
    n, k = 33, 1024
    weight, scale = fp8_weight(n, k) if fp8 else (torch.randn(n, k), None)
    x, norm, residual = torch.randn(tokens, k), torch.randn(k) * 0.1, torch.randn(tokens, n)
    out = torch.full((tokens, n), float("nan"))
    best = (torch.empty(tokens * 8), torch.empty(tokens * 8, dtype=torch.int32))
    options = {"norm_weight": norm, "residual": residual}
    kernels.linear(x, weight, scale, out=out, best=best, config=config, **options)
    assert relative(out, reference.linear(x, weight, scale, **options)) < 1e-5
    programs = -(-n // config[0])
    values, rows = (b[: tokens * programs].view(tokens, programs) for b in best)
    found = rows.gather(1, values.argmax(1, keepdim=True))[:, 0]
    assert torch.equal(found.long(), out.argmax(1))


@pytest.mark.parametrize("tokens", [17, 40])
def test_more_rows_than_a_narrow_tile(tokens):
    weight, scale = fp8_weight(70, 384)
    x, norm = torch.randn(tokens, 384), torch.randn(384) * 0.1
    out = kernels.linear(x, weight, scale, norm_weight=norm)
    assert relative(out, reference.linear(x, weight, scale, norm_weight=norm)) < 1e-5


@pytest.mark.parametrize("tokens", [1, 2])
def test_tail_follows_the_first_matrix(tokens):
    weight, scale = fp8_weight(24, 512)
    x, tail, norm = torch.randn(tokens, 512), torch.randn(6, 512), torch.randn(512) * 0.1
    out = kernels.linear(x, weight, scale, norm_weight=norm, tail=tail)
    want = [reference.linear(x, w, s, norm_weight=norm) for w, s in ((weight, scale), (tail, None))]
    assert relative(out, torch.cat(want, 1)) < 1e-5


def test_residual_may_be_the_output():
    x, weight = torch.randn(1, 512), torch.randn(16, 512)
    out = torch.randn(1, 16)
    want = reference.linear(x, weight, residual=out)
    kernels.linear(x, weight, residual=out, out=out)
    assert relative(out, want) < 1e-5


@pytest.mark.parametrize(("n", "k"), [(12288, 2048), (2048, 4096), (151936, 2048), (5120, 25600)])
@pytest.mark.parametrize("fp8", [True, False])
def test_launch_choices_fit_the_shape(n, k, fp8):
    rows, chunks, _ = kernels.gemv_config(n, k, fp8)
    unit = 512 if fp8 else 256
    assert (k % (chunks * unit), 128 % rows) == (0, 0)
    for tokens in (2, 64):
        rows, slices, _, _ = kernels.skinny_config(n, k, fp8, tokens)
        assert (128 % rows, k % (slices * 128)) == (0, 0)
