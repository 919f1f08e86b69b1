"""Group-scaled INT4 as compressed-tensors packs it (pack-quantized), and nibbles in general.

``weight_packed`` int32 (out, in/8), low nibble first, holds the value plus 8; ``weight_scale``
(out, in/g); ``weight_shape`` int64 (2,); with asymmetric weights ``weight_zero_point`` packed
along out; with activation order ``weight_g_idx`` (in,). This is also how packed weights lie in
memory, so other formats are brought into this order when they are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.errors import ConfigError
from qnext.kernels.scaled_matmul.reference import unpack_nibbles
from qnext.quant.format import FLOATS, Piece, Source
from qnext.quant.matrix import Int4Matrix
from qnext.weights import whole

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def pack_nibbles(values: Tensor) -> Tensor:
    """(..., K) of 0..15 -> (..., ceil(K / 8)) int32, low nibble first."""
    pairs = F.pad(values.to(torch.uint8), (0, -values.shape[-1] % 8)).unflatten(-1, (-1, 2))
    octets = pairs[..., 0] | pairs[..., 1] << 4
    return octets.contiguous().view(torch.int32)


def unpacked_along_rows(count: int, x: Tensor) -> Tensor:
    """Zero points (ceil(N / 8), G) packed along rows -> (N, G) uint8."""
    return unpack_nibbles(x.T)[:, :count].T


def count_groups(shape: tuple[int, ...], size: int, *, ragged: bool = False) -> int:
    """Groups in a row of a matrix (N, K); size 0 means one.

    Raises:
        ConfigError: the size does not divide K and columns do not name their group.
    """
    columns = shape[-1]
    if size and columns % size and not ragged:
        raise ConfigError(
            f"group_size {size} does not divide the {columns} columns of a matrix {list(shape)}",
            hint="config.json belongs to other weights",
        )
    return -(-columns // size) if size else 1


@dataclass(frozen=True)
class Int4Scheme:
    """Compressed-tensors pack-quantized, 4 bits.

    Attributes:
        group_size: columns per scale; 0 means the whole row.
        symmetric: no zero points.
        g_idx: activation order: each column's group is stored.
    """

    group_size: int = 128
    symmetric: bool = True
    g_idx: bool = False

    @property
    def label(self) -> str:
        """See ``Scheme``."""
        words = f"group {self.group_size}" if self.group_size else "per row"
        return f"int4 {words}" + ("" if self.symmetric else ", zero points")

    def pieces(self, shape: tuple[int, ...]) -> tuple[Piece, ...]:
        """See ``Scheme``."""
        n, k = shape
        groups = count_groups(shape, self.group_size, ragged=self.g_idx)
        found = [
            Piece(".weight_packed", (n, -(-k // 8)), ("I32",), "values"),
            Piece(".weight_scale", (n, groups), FLOATS, "scale"),
            Piece(".weight_shape", (2,), ("I64", "I32"), "", value=shape),
        ]
        if not self.symmetric:
            unpack = partial(unpacked_along_rows, n)
            piece = Piece(".weight_zero_point", (-(-n // 8), groups), ("I32",), "zero", unpack)
            found.append(piece)
        if self.g_idx:
            found.append(Piece(".weight_g_idx", (k,), ("I32", "I64"), "g_idx", whole))
        return tuple(found)

    def matrix(
        self, shape: tuple[int, ...], sources: Sequence[Source], dtypes: Mapping[str, str]
    ) -> Int4Matrix:
        """See ``Scheme``."""
        return Int4Matrix(
            shape, sources, self.group_size or shape[-1], TORCH[dtypes[".weight_scale"]],
            zero=not self.symmetric, g_idx=self.g_idx,
        )  # fmt: skip

    def encode(self, weight: Tensor, **how: Any) -> dict[str, Tensor]:
        """Round to nearest on the scale of each group, symmetric.

        Args:
            weight: (N, K); the scales get its dtype.
            how: ``importance`` (K,), mean squares of the inputs. With it each group takes the
                scale, of a few below its largest entry, that changes the output least.
        """
        size = self.group_size or weight.shape[1]
        importance: Tensor | None = how.get("importance")
        scale = group_scales(weight, size, importance)
        values = quantise_groups(weight.float(), scale.float())
        shape = torch.tensor(weight.shape, dtype=torch.int64)
        return {".weight_packed": pack_nibbles(values.flatten(1) + 8), ".weight_scale": scale,
                ".weight_shape": shape}  # fmt: skip


def quantise_groups(weight: Tensor, scale: Tensor) -> Tensor:
    """(N, K) and scales (N, G) -> whole numbers -8..7, (N, G, K / G)."""
    groups = weight.unflatten(1, (scale.shape[1], -1))
    return (groups / scale.unsqueeze(-1)).round_().clamp_(-8, 7)


SHRINKS = tuple(1 - 0.03 * i for i in range(11))
"""Scales that are tried, as shares of the one that fits the largest entry."""


def group_scales(weight: Tensor, size: int, importance: Tensor | None = None) -> Tensor:
    """One scale per group, (N, K / size) in the dtype of the weight.

    Without ``importance`` the scale that keeps the largest entry; with it the best of
    ``SHRINKS``: smaller scales clip outliers and resolve the rest more finely.
    """
    wide = weight.float()
    groups = wide.unflatten(1, (-1, size))
    widest = groups.abs().amax(-1) / 7.5
    widest = torch.where(widest > 0, widest, torch.ones_like(widest))
    tiny = torch.finfo(weight.dtype).tiny
    if importance is None:
        return widest.to(weight.dtype).clamp_(min=tiny)
    share = importance.float().view(1, -1, size)
    best, least = torch.empty_like(widest), torch.full_like(widest, torch.inf)
    for shrink in SHRINKS:
        scale = (widest * shrink).to(weight.dtype).clamp_(min=tiny).float()
        error = quantise_groups(wide, scale).mul_(scale.unsqueeze(-1)).sub_(groups)
        loss = error.square_().mul_(share).sum(-1)
        better = loss < least
        best, least = torch.where(better, scale, best), torch.where(better, loss, least)
    return best.to(weight.dtype)
