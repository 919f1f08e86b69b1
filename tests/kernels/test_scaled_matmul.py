"""Packed products against plain ones, and the exact widening of every FP8 number."""

from __future__ import annotations

import pytest
import torch

from qnext.errors import KernelError
from qnext.kernels.experts import reference as plain
from qnext.kernels.scaled_matmul import (
    Fp8Weight,
    Int4Weight,
    PackedWeight,
    dequantise,
    reference,
    scaled_experts,
    scaled_linear,
)

RNG = torch.Generator().manual_seed(0)


def fp8(*shape: int, block: tuple[int, int]) -> Fp8Weight:
    values = torch.randn(shape, generator=RNG).to(torch.float8_e4m3fn)
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return Fp8Weight(values, torch.rand(grid, generator=RNG) + 0.1, block)


def int4(*shape: int, groups: int, zero: bool, order: int = 0) -> Int4Weight:
    words = torch.randint(-(2**31), 2**31, (*shape[:-1], -(-shape[-1] // 8)), generator=RNG)
    grid = (*shape[:-1], groups)
    zeros = torch.randint(0, 16, grid, generator=RNG).to(torch.uint8) if zero else None
    index = None
    if order:
        index = torch.randint(0, groups, (*shape[:-2], order, shape[-1]), generator=RNG).int()
    return Int4Weight(words.int(), torch.rand(grid, generator=RNG), zeros, index, shape[-1])


WEIGHTS: dict[str, PackedWeight] = {
    "fp8": fp8(200, 150, block=(128, 128)),
    "fp8, whole blocks": fp8(64, 96, block=(16, 32)),
    "fp8, rows": fp8(33, 40, block=(1, 40)),
    "int4": int4(24, 64, groups=2, zero=False),
    "int4, zeros": int4(24, 64, groups=4, zero=True),
    "int4, ragged words": int4(9, 36, groups=3, zero=True),
    "int4, order": int4(24, 64, groups=5, zero=True, order=2),
}


def test_every_number_of_fp8() -> None:
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[(numbers & 127) != 127].view(torch.float8_e4m3fn)
    assert len(numbers) == 254
    assert torch.equal(reference.widen(numbers), numbers.float())
    assert torch.signbit(reference.widen(numbers)).sum() == 127


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("piece", [1, 700, 1 << 22])
def test_linear_in_pieces(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "PIECE", piece)
    weight = WEIGHTS[name]
    whole = dequantise(weight, torch.float64)
    x = torch.randn(5, weight.shape[1], generator=RNG, dtype=torch.float64)
    bias = torch.randn(weight.shape[0], generator=RNG, dtype=torch.float64)
    for b in (None, bias):
        out = scaled_linear(x, weight, b)
        torch.testing.assert_close(out, x @ whole.T + (0 if b is None else b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_rounding(dtype: torch.dtype) -> None:
    for weight in WEIGHTS.values():
        assert torch.equal(dequantise(weight, dtype), dequantise(weight, torch.float32).to(dtype))


@pytest.mark.parametrize("tokens", [1, 7, 60])
@pytest.mark.parametrize("kind", ["fp8", "int4", "plain down"])
def test_experts(kind: str, tokens: int) -> None:
    experts, hidden, inner = 6, 32, 24
    if kind == "fp8":
        gate_up: PackedWeight = fp8(experts, 2 * inner, hidden, block=(8, 16))
    else:
        gate_up = int4(experts, 2 * inner, hidden, groups=4, zero=True, order=2)
    down: PackedWeight | torch.Tensor = int4(experts, hidden, inner, groups=3, zero=False)
    if kind == "plain down":
        down = torch.randn(experts, hidden, inner, generator=RNG, dtype=torch.float64)
    x = torch.randn(tokens, hidden, generator=RNG, dtype=torch.float64)
    ids = torch.stack([torch.randperm(experts, generator=RNG)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=RNG, dtype=torch.float64)
    expected = plain.experts(
        x, dequantise(gate_up, torch.float64), dequantise(down, torch.float64), ids, weights
    )
    torch.testing.assert_close(scaled_experts(x, gate_up, down, ids, weights), expected)


def test_only_chosen_experts_are_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, down = fp8(6, 48, 32, block=(8, 16)), fp8(6, 32, 24, block=(8, 8))
    seen = []
    original = reference.dequantise

    def note(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
        seen.append(weight.shape)
        return original(weight, dtype)

    monkeypatch.setattr(reference, "dequantise", note)
    ids = torch.tensor([[4, 1], [1, 4]])
    scaled_experts(torch.ones(2, 32), gate_up, down, ids, torch.ones(2, 2))
    assert sorted(seen) == [(32, 24), (32, 24), (48, 32), (48, 32)]


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(KernelError, match="does not fit"):
        scaled_linear(torch.ones(2, 33), WEIGHTS["int4"])
    gate_up, down = fp8(6, 48, 32, block=(8, 8)), fp8(6, 24, 32, block=(8, 8))
    with pytest.raises(KernelError, match="do not belong together"):
        scaled_experts(torch.ones(2, 32), gate_up, down, torch.zeros(2, 1), torch.ones(2, 1))
