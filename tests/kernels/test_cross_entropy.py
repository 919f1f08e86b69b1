"""Cross-entropy and its slope: the reference by autograd, Triton in the interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.errors import KernelError
from qnext.kernels.cross_entropy import cross_entropy, reference
from qnext.kernels.cross_entropy import triton as kernels


def _inputs(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(rows + columns)
    logits = 4 * torch.randn(rows, columns, generator=rng, dtype=torch.float64)
    labels = torch.randint(columns, (rows,), generator=rng)
    labels[::3] = -100
    return logits.to(dtype), labels


def test_the_reference_is_the_gradient() -> None:
    logits, labels = _inputs(7, 11, torch.float64)
    x = logits.clone().requires_grad_()
    want = F.cross_entropy(x, labels, reduction="none")
    losses, slopes = reference.cross_entropy(logits, labels, 0.25)
    torch.testing.assert_close(losses, want.detach())
    (grad,) = torch.autograd.grad(0.25 * want.sum(), x)
    torch.testing.assert_close(slopes, grad)


@pytest.mark.parametrize("columns", [5, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_is_the_reference(
    columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "COLUMNS", 32)  # the two widest rows take several tiles
    logits, labels = _inputs(6, columns, dtype)
    losses, slopes = reference.cross_entropy(logits.double(), labels, 0.5)
    got, over = kernels.cross_entropy(logits, labels, 0.5)
    torch.testing.assert_close(got, losses.float(), rtol=1e-5, atol=1e-5)
    tight = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.01, "atol": 1e-6}
    torch.testing.assert_close(over.double(), slopes, **tight)
    assert over.data_ptr() == logits.data_ptr()


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-3e4, -3e4, -3e4]])
    labels = torch.tensor([1, 2])
    for function in (reference.cross_entropy, kernels.cross_entropy):
        losses, slopes = function(logits.clone(), labels, 1.0)
        torch.testing.assert_close(losses, torch.tensor([1e4, 1.0986123]))
        want = torch.tensor([[1.0, -1.0, 0.0], [1 / 3, 1 / 3, -2 / 3]])
        torch.testing.assert_close(slopes, want, rtol=1e-3, atol=1e-3)


def test_labels_must_fit_the_rows() -> None:
    with pytest.raises(KernelError, match="do not belong together"):
        cross_entropy(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), 1.0)
