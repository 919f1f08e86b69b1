"""Partial rotary embedding: which channels turn, with whom, and how far (spec 3.4)."""

from __future__ import annotations

import torch

from qnext.kernels.rotary import apply_rotary


def test_only_the_first_channels_turn_in_half_split_pairs() -> None:
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angle = torch.rand(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = apply_rotary(x, angle.cos(), angle.sin())
    assert torch.equal(y[..., 6:], x[..., 6:])
    for j in range(3):
        pair = torch.complex(x[..., j], x[..., j + 3]) * torch.exp(1j * angle[:, None, j])
        torch.testing.assert_close(y[..., j], pair.real, rtol=0, atol=1e-14)
        torch.testing.assert_close(y[..., j + 3], pair.imag, rtol=0, atol=1e-14)
