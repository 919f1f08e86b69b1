"""FP8 e4m3 weights: the official block format, and compressed-tensors' float-quantized.

Official (spec section 8.1): ``X.weight`` in float8_e4m3fn beside ``X.weight_scale_inv`` of shape
ceil(out/128) x ceil(in/128), by which blocks are multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qnext.quant.format import FLOATS, Piece, Source
from qnext.quant.matrix import Fp8Matrix

MAX = 448.0
"""The largest e4m3 number."""


@dataclass(frozen=True)
class Fp8Scheme:
    """E4M3 with one fp32 scale per block.

    Attributes:
        block: rows and columns per scale; 0 means all of them.
        scale_suffix: name of the scale tensor.
    """

    block: tuple[int, int] = (128, 128)
    scale_suffix: str = ".weight_scale_inv"

    @property
    def label(self) -> str:
        """See ``Scheme``."""
        words = {(0, 0): "per tensor", (1, 0): "per row"}
        return "fp8 " + words.get(self.block, "{}x{} blocks".format(*self.block))

    def _block(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return self.block[0] or shape[-2], self.block[1] or shape[-1]

    def pieces(self, shape: tuple[int, ...]) -> tuple[Piece, ...]:
        """See ``Scheme``."""
        rows, columns = self._block(shape)
        grid = (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))
        disk, unpack = grid, _as_is
        if self.block == (0, 0):
            disk, unpack = (1,), _one_by_one
        return (
            Piece(".weight", shape, ("F8_E4M3",), "values"),
            Piece(self.scale_suffix, disk, FLOATS, "scale", unpack),
        )

    def matrix(
        self, shape: tuple[int, ...], sources: Sequence[Source], dtypes: Mapping[str, str]
    ) -> Fp8Matrix:
        """See ``Scheme``; a block of 0 rows is all rows of each disk matrix."""
        del dtypes
        rows = self.block[0] or max(source.rows for source in sources)
        return Fp8Matrix(shape, sources, (rows, self.block[1] or shape[-1]))

    def encode(self, weight: Tensor, **how: Any) -> dict[str, Tensor]:
        """Round to nearest; the largest entry of a block becomes 448.

        Args:
            weight: (N, K) floating.
            how: nothing is known here.
        """
        del how
        rows, columns = self._block(tuple(weight.shape))
        n, k = weight.shape
        wide = weight.float()
        padded = torch.nn.functional.pad(wide, (0, -k % columns, 0, -n % rows))
        blocks = padded.view(len(padded) // rows, rows, -1, columns)
        scale = blocks.abs().amax((1, 3)) / MAX
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        values = (blocks / scale[:, None, :, None]).clamp_(-MAX, MAX)
        values = values.view(padded.shape)[:n, :k].to(torch.float8_e4m3fn)
        if self.block == (0, 0):
            scale = scale.view(1)
        return {".weight": values.contiguous(), self.scale_suffix: scale}


def _as_is(x: Tensor) -> Tensor:
    return x


def _one_by_one(x: Tensor) -> Tensor:
    return x.view(1, 1)
