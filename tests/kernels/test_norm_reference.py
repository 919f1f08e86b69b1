"""Both RMS norms against spec 2.1 and 2.2, and where they round."""

from __future__ import annotations

import pytest
import torch

from qnext.kernels.norm import gated_rms_norm, rms_norm
from qnext.layers.norm import RMSNorm

RNG = torch.Generator().manual_seed(0)
X, Z = torch.randn(2, 7, 33, generator=RNG, dtype=torch.float64)
W = torch.randn(33, generator=RNG, dtype=torch.float64)
NORMED = X / (X.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_written_equations(dtype: torch.dtype, atol: float) -> None:
    x, z, w = X.to(dtype), Z.to(dtype), W.to(dtype)
    expected = NORMED * (1 + W)
    torch.testing.assert_close(rms_norm(x, w, 1e-6).double(), expected, rtol=0, atol=atol)
    expected = W * NORMED * Z * Z.sigmoid()
    torch.testing.assert_close(gated_rms_norm(x, z, w, 1e-6).double(), expected, rtol=0, atol=atol)


def test_bf16_is_rounded_once_at_the_end() -> None:
    x, w = X.bfloat16(), W.bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = (exact * (1 + w.double())).bfloat16()
    # fp32 against fp64 inside may differ where a value lies on the edge of two bf16 numbers.
    assert (rms_norm(x, w, 1e-6) == expected).float().mean() > 0.99


def test_bf16_gated_norm_rounds_the_normed_value_first() -> None:
    x, z, w = X.bfloat16(), Z.bfloat16(), W.bfloat16()
    normed = torch.nn.functional.rms_norm(x.float(), (33,), None, 1e-6).bfloat16()
    gate = z.float() * z.float().sigmoid()
    expected = ((w * normed).float() * gate).bfloat16()
    assert (gated_rms_norm(x, z, w, 1e-6) == expected).float().mean() > 0.99


def test_plain_weights_of_qwen3() -> None:
    norm = RMSNorm(33, 1e-6, zero_centred=False).double()
    norm.weight.data.copy_(W)
    torch.testing.assert_close(norm(X), NORMED * W, rtol=0, atol=1e-13)
