"""The small-batch fused decode against ``fused_decode``, in the interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from qnext.kernels.gated_delta import triton_decode, triton_recurrent

HK, HV, DK, DV = 2, 4, 16, 32
C = 2 * HK * DK + HV * DV


@pytest.mark.parametrize("first", [0, 6])
def test_ring_follows_the_shifted_window_over_several_tokens(first):
    torch.manual_seed(first)
    slots = torch.tensor([2, -1, 0], dtype=torch.int32)
    positions = torch.tensor([first, 3, first + 1], dtype=torch.int32)
    shifted, state = torch.randn(3, C, 3), torch.randn(3, HV, DK, DV)
    ring = triton_decode.ring_of(shifted, torch.tensor([first + 1, 0, first]))
    taps, a_log, dt, norm = torch.randn(C, 4), torch.randn(HV), torch.randn(HV), torch.randn(DV)
    mine, idle = state.clone(), (ring[1].clone(), state[1].clone())
    for step in range(5):
        wide = torch.randn(3, C + HV * DV)
        args = (wide[:, :C], wide[:, C:], torch.randn(3, HV), torch.randn(3, HV))
        weights = (taps, a_log, dt, norm)
        want = triton_recurrent.fused_decode(*args, shifted, *weights, state, slots, 1e-6)
        out = torch.full_like(want, float("nan"))
        triton_decode.fused_decode_ring(
            *args, ring, *weights, mine, slots, positions + step, 1e-6, out=out
        )
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine, state, rtol=1e-4, atol=1e-5)
    assert torch.equal(out[1], torch.zeros(HV * DV))
    assert torch.equal(ring[1], idle[0])
    assert torch.equal(mine[1], idle[1])
