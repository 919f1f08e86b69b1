"""GPTQ's INT4 layout (spec section 8.2).

``qweight`` int32 (in/8, out) packed along in; ``scales`` (in/g, out); ``qzeros`` int32
(in/g, out/8) packed along out; ``g_idx`` int32 (in,). Format ``gptq`` stores zero points minus
one, ``gptq_v2`` as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qnext.errors import ConfigError
from qnext.kernels.scaled_matmul.reference import unpack_nibbles
from qnext.quant.format import FLOATS, Piece, Source
from qnext.quant.int4 import TORCH, count_groups
from qnext.quant.matrix import Int4Matrix


def transposed(x: Tensor) -> Tensor:
    """(a, b) -> (b, a), contiguous."""
    return x.T.contiguous()


def zeros_minus_one(x: Tensor) -> Tensor:
    """``qzeros`` of format gptq: (G, N / 8) int32 -> (N, G) uint8; one is added, modulo 16."""
    return (unpack_nibbles(x) + 1 & 15).T


def zeros_plain(x: Tensor) -> Tensor:
    """``qzeros`` of format gptq_v2: (G, N / 8) int32 -> (N, G) uint8."""
    return unpack_nibbles(x).T


@dataclass(frozen=True)
class GptqScheme:
    """GPTQ, 4 bits.

    Attributes:
        group_size: columns per scale; 0 means the whole row.
        g_idx: whether the files hold ``g_idx``.
        zeros_minus_one: format ``gptq``; otherwise ``gptq_v2``.
    """

    group_size: int
    g_idx: bool
    zeros_minus_one: bool

    @property
    def label(self) -> str:
        """See ``Scheme``."""
        words = f"group {self.group_size}" if self.group_size else "per row"
        return f"gptq int4 {words}"

    def pieces(self, shape: tuple[int, ...]) -> tuple[Piece, ...]:
        """See ``Scheme``."""
        n, k = shape
        if n % 8 or k % 8:
            raise ConfigError(
                f"GPTQ cannot pack a matrix of {n}x{k}: eight columns or rows fill a word",
                hint="config.json belongs to other weights",
            )
        groups = count_groups(shape, self.group_size, ragged=self.g_idx)
        unpack = zeros_minus_one if self.zeros_minus_one else zeros_plain
        found = [
            Piece(".qweight", (k // 8, n), ("I32",), "values", transposed),
            Piece(".scales", (groups, n), FLOATS, "scale", transposed),
            Piece(".qzeros", (groups, n // 8), ("I32",), "zero", unpack),
        ]
        if self.g_idx:
            found.append(Piece(".g_idx", (k,), ("I32",), "g_idx"))
        return tuple(found)

    def matrix(
        self, shape: tuple[int, ...], sources: Sequence[Source], dtypes: Mapping[str, str]
    ) -> Int4Matrix:
        """See ``Scheme``."""
        return Int4Matrix(
            shape, sources, self.group_size or shape[-1], TORCH[dtypes[".scales"]],
            zero=True, g_idx=self.g_idx,
        )  # fmt: skip

    def encode(self, weight: Tensor, **how: Any) -> dict[str, Tensor]:
        """Not offered: qnext writes compressed-tensors."""
        raise ConfigError("qnext does not write GPTQ", hint="use --format int4")
