"""Packed weights as tensors: block-scaled FP8 and group-scaled INT4.

Leading axes (experts) come before the rows; indexing takes one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """``w[i, j] = values[i, j] * scale[i // block[0], j // block[1]]``.

    Attributes:
        values: (..., N, K) float8_e4m3fn.
        scale: (..., ceil(N / block[0]), ceil(K / block[1])) fp32.
        block: rows and columns that share one scale; (128, 128) in the official checkpoints
            unless rows were permuted by less than 128.
    """

    values: Tensor
    scale: Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, experts first."""
        return tuple(self.values.shape)

    def __getitem__(self, index: int) -> Fp8Weight:
        return Fp8Weight(self.values[index], self.scale[index], self.block)

    def rows(self, begin: int, end: int) -> Fp8Weight:
        """Some rows of a single matrix; ``begin`` must be a multiple of ``block[0]``."""
        step = self.block[0]
        scale = self.scale[begin // step : -(-end // step)]
        return Fp8Weight(self.values[begin:end], scale, self.block)


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """``w[i, j] = (u[i, j] - zero[i, group(j)]) * scale[i, group(j)]``, u = 0..15.

    Attributes:
        values: (..., N, ceil(K / 8)) int32; nibble n of word c, low bits first, is column
            8 c + n.
        scale: (..., N, G) floating.
        zero: (..., N, G) uint8; None means 8 everywhere.
        g_idx: (..., P, K) int32, the group of each column, for P equal spans of rows; None means
            consecutive groups of equal size.
        columns: K.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None
    g_idx: Tensor | None
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, experts first."""
        return (*self.values.shape[:-1], self.columns)

    def __getitem__(self, index: int) -> Int4Weight:
        zero = None if self.zero is None else self.zero[index]
        g_idx = None if self.g_idx is None else self.g_idx[index]
        return Int4Weight(self.values[index], self.scale[index], zero, g_idx, self.columns)

    def rows(self, begin: int, end: int) -> Int4Weight:
        """Some rows of a single matrix; they must lie in one span of ``g_idx``."""
        zero = None if self.zero is None else self.zero[begin:end]
        g_idx = self.g_idx
        if g_idx is not None:
            span = len(self.values) // len(g_idx)
            g_idx = g_idx[begin // span : begin // span + 1]
        return Int4Weight(self.values[begin:end], self.scale[begin:end], zero, g_idx, self.columns)


PackedWeight = Fp8Weight | Int4Weight
AnyWeight = PackedWeight | Tensor
