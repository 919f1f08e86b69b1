"""AWQ's INT4 layout, version gemm (spec section 8.2).

``qweight`` int32 (in, out/8) and ``qzeros`` int32 (in/g, out/8), both packed along out in an
interleaved order; ``scales`` (in/g, out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qnext.errors import ConfigError
from qnext.kernels.scaled_matmul.reference import unpack_nibbles
from qnext.quant.format import FLOATS, Piece, Source
from qnext.quant.gptq import transposed
from qnext.quant.int4 import TORCH, count_groups, pack_nibbles
from qnext.quant.matrix import Int4Matrix

# Nibble n of a word holds column (0, 2, 4, 6, 1, 3, 5, 7)[n]; this is where column c is found.
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def unpack_interleaved(x: Tensor) -> Tensor:
    """(a, N / 8) int32 -> (a, N) uint8."""
    nibbles = unpack_nibbles(x).unflatten(-1, (-1, 8))
    return nibbles[..., torch.tensor(ORDER, device=x.device)].flatten(-2)


def words(x: Tensor) -> Tensor:
    """``qweight`` (K, N / 8) -> our words (N, K / 8)."""
    return pack_nibbles(unpack_interleaved(x).T)


def zeros(x: Tensor) -> Tensor:
    """``qzeros`` (G, N / 8) -> (N, G) uint8."""
    return unpack_interleaved(x).T


@dataclass(frozen=True)
class AwqScheme:
    """AWQ gemm, 4 bits.

    Attributes:
        group_size: columns per scale; 0 means the whole row.
        zero_point: whether ``qzeros`` is stored.
    """

    group_size: int
    zero_point: bool = True

    @property
    def label(self) -> str:
        """See ``Scheme``."""
        return f"awq int4 group {self.group_size}" if self.group_size else "awq int4 per row"

    def pieces(self, shape: tuple[int, ...]) -> tuple[Piece, ...]:
        """See ``Scheme``."""
        n, k = shape
        if n % 8:
            raise ConfigError(
                f"AWQ cannot pack a matrix of {n}x{k}: eight rows fill a word",
                hint="config.json belongs to other weights",
            )
        groups = count_groups(shape, self.group_size)
        found = [
            Piece(".qweight", (k, n // 8), ("I32",), "values", words),
            Piece(".scales", (groups, n), FLOATS, "scale", transposed),
        ]
        if self.zero_point:
            found.append(Piece(".qzeros", (groups, n // 8), ("I32",), "zero", zeros))
        return tuple(found)

    def matrix(
        self, shape: tuple[int, ...], sources: Sequence[Source], dtypes: Mapping[str, str]
    ) -> Int4Matrix:
        """See ``Scheme``."""
        return Int4Matrix(
            shape, sources, self.group_size or shape[-1], TORCH[dtypes[".scales"]],
            zero=self.zero_point, g_idx=False,
        )  # fmt: skip

    def encode(self, weight: Tensor, **how: Any) -> dict[str, Tensor]:
        """Not offered: qnext writes compressed-tensors."""
        raise ConfigError("qnext does not write AWQ", hint="use --format int4")
