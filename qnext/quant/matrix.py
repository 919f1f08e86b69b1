"""Packed matrices as modules: what stands in the tree where a weight parameter stood.

A matrix keeps the bytes of the checkpoint. Disk tensors arrive one by one and in any order;
``place`` puts each where it belongs, with the same row views (``qnext.weights``) that place
plain weights, so permuted and stacked projections take their scales with them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd

import torch
from torch import Tensor, nn

from qnext.errors import CheckpointError
from qnext.kernels.scaled_matmul import Fp8Weight, Int4Weight, PackedWeight, dequantise
from qnext.quant.format import PackedTensor, Source
from qnext.weights import Part, View, whole

Shape = tuple[int, ...]


def _frozen(shape: Shape, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


class PackedMatrix(nn.Module):
    """A weight in a packed format, perhaps stacked over experts."""

    def pack(self) -> PackedWeight:
        """The tensors as kernels take them."""
        raise NotImplementedError

    def place(self, tensor: PackedTensor, part: Part, disk: Tensor) -> None:
        """Copy what one disk tensor holds of this matrix.

        Raises:
            CheckpointError: contents that the format does not allow.
        """
        raise NotImplementedError

    def plain_field(self, tensor: PackedTensor) -> Tensor | None:
        """The field that a disk tensor fills as it is; None if ``place`` must do it."""
        raise NotImplementedError

    def settle(self) -> None:
        """Called once everything is placed: drop what turned out to be trivial."""

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The plain matrix."""
        return dequantise(self.pack(), dtype)


class Fp8Matrix(PackedMatrix):
    """Block-scaled e4m3. ``block`` is the disk's, its rows cut smaller where rows moved by less.

    Args:
        shape: (N, K) or (E, N, K).
        sources: disk matrices whose rows make up this one (one expert's).
        block: rows and columns per scale on disk.
    """

    def __init__(self, shape: Shape, sources: Sequence[Source], block: tuple[int, int]) -> None:
        super().__init__()
        *lead, rows, columns = shape
        self.disk_block = block
        self.block = (shared_rows(sources, rows, block[0]), block[1])
        self.values = _frozen(shape, torch.float8_e4m3fn)
        grid = (*lead, -(-rows // self.block[0]), -(-columns // block[1]))
        self.scale = _frozen(grid, torch.float32)

    def pack(self) -> Fp8Weight:
        """See ``PackedMatrix``."""
        return Fp8Weight(self.values, self.scale, self.block)

    def plain_field(self, tensor: PackedTensor) -> Tensor | None:
        """See ``PackedMatrix``."""
        return self.values if tensor.piece.field == "values" else None

    def place(self, tensor: PackedTensor, part: Part, disk: Tensor) -> None:
        """See ``PackedMatrix``."""
        disk = tensor.piece.unpack(disk)
        if tensor.piece.field == "values":
            part.put(self.values).copy_(part.take(disk))
            return
        if self.values.ndim > 2 and part.index is None:  # stacked on disk as it is here
            self.scale.copy_(disk)
            return
        target = self.scale if part.index is None else self.scale[part.index]
        source, place = row_map(part.take, part.rows, tensor.rows, self.values.shape[-2])
        first = place % self.block[0] == 0  # one row speaks for its block
        where = (place[first] // self.block[0]).to(target.device)
        which = (source[first] // self.disk_block[0]).to(disk.device)
        target[where] = disk[which].to(target)


class Int4Matrix(PackedMatrix):
    """Group-scaled 4 bits, eight columns to an int32.

    Args:
        shape: (N, K) or (E, N, K).
        sources: disk matrices whose rows make up this one (one expert's).
        group_size: columns per scale.
        scale_dtype: of the scales, as on disk.
        zero: whether zero points are stored.
        g_idx: whether each column's group is stored.
    """

    def __init__(
        self,
        shape: Shape,
        sources: Sequence[Source],
        group_size: int,
        scale_dtype: torch.dtype,
        *,
        zero: bool,
        g_idx: bool,
    ) -> None:
        super().__init__()
        *lead, rows, columns = shape
        self.columns, self.group_size = columns, group_size
        groups = -(-columns // group_size)
        self.values = _frozen((*lead, rows, -(-columns // 8)), torch.int32)
        self.scale = _frozen((*lead, rows, groups), scale_dtype)
        self.zero = _frozen((*lead, rows, groups), torch.uint8) if zero else None
        spans = len({source.stem for source in sources})
        self.g_idx = _frozen((*lead, spans, columns), torch.int32) if g_idx else None

    def pack(self) -> Int4Weight:
        """See ``PackedMatrix``."""
        return Int4Weight(self.values, self.scale, self.zero, self.g_idx, self.columns)

    def plain_field(self, tensor: PackedTensor) -> Tensor | None:
        """See ``PackedMatrix``."""
        as_is = tensor.piece.unpack is whole and tensor.piece.field in ("values", "scale")
        return getattr(self, tensor.piece.field) if as_is else None

    def place(self, tensor: PackedTensor, part: Part, disk: Tensor) -> None:
        """See ``PackedMatrix``."""
        name = tensor.piece.field
        if not name:  # weight_shape: checked when it is read
            return
        disk, field = tensor.piece.unpack(disk), getattr(self, name)
        if name == "g_idx":
            groups = self.scale.shape[-1]
            if not bool(((disk >= 0) & (disk < groups)).all()):
                raise CheckpointError(
                    f"{tensor.name} names groups outside 0..{groups - 1}",
                    hint="the file is damaged, or group_size in config.json is wrong",
                )
            (field if part.index is None else field[part.index])[tensor.span].copy_(disk)
            return
        part.put(field).copy_(part.take(disk))

    def settle(self) -> None:
        """Symmetric zeros and the usual order of groups need no tensors."""
        if self.zero is not None and bool((self.zero == 8).all()):
            self.zero = None
        if self.g_idx is not None and self.columns % self.group_size == 0:
            usual = torch.arange(self.columns, device=self.g_idx.device) // self.group_size
            if bool((self.g_idx == usual).all()):
                self.g_idx = None


@lru_cache(maxsize=512)
def row_map(take: View, rows: View, disk_rows: int, param_rows: int) -> tuple[Tensor, Tensor]:
    """Row numbers (in the disk matrix, in the parameter) that a part connects, (n,) each."""
    source = take(torch.arange(disk_rows)).flatten()
    return source, rows(torch.arange(param_rows)).flatten()


def shared_rows(sources: Sequence[Source], rows: int, block: int) -> int:
    """The most rows per scale that is exact: no block of the parameter spans two scales."""
    owner = torch.full((rows,), -1)
    count = 0
    for source in sources:
        at, place = row_map(source.part.take, source.part.rows, source.rows, rows)
        owner[place] = count + at // block
        count += -(-source.rows // block)
    change = (owner[1:] != owner[:-1]).nonzero().flatten() + 1
    return gcd(block, *change.tolist())
