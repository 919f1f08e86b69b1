"""What a format says: the disk tensors of a matrix, the packed form, and how to make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from qnext.weights import DiskTensor, Part, whole

if TYPE_CHECKING:
    from qnext.quant.matrix import PackedMatrix

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Piece:
    """One disk tensor of a packed matrix.

    Attributes:
        suffix: what follows the module's name.
        shape: on disk.
        dtypes: allowed, in safetensors' words.
        field: of the packed matrix that it fills; "" for facts that are only checked.
        unpack: disk tensor -> rows of that field.
        value: what an integer fact must be.
    """

    suffix: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    field: str
    unpack: Callable[[Tensor], Tensor] = whole
    value: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PackedTensor(DiskTensor):
    """A disk tensor that is a piece of a packed matrix.

    Attributes:
        piece: which.
        rows: of the whole disk matrix.
        span: which of the disk matrices of one parameter this is (gate 0, up 1).
    """

    piece: Piece = field(kw_only=True)
    rows: int = field(kw_only=True)
    span: int = field(kw_only=True, default=0)


@dataclass(frozen=True)
class Source:
    """A disk matrix that gives rows to a parameter: its module's name, one part, its rows."""

    stem: str
    part: Part
    rows: int


class Scheme(Protocol):
    """How the weight of one module is stored."""

    @property
    def label(self) -> str:
        """A few words for people: ``fp8 128x128``."""
        ...

    def pieces(self, shape: tuple[int, ...]) -> tuple[Piece, ...]:
        """The disk tensors of a matrix (N, K), or (E, N, K) stacked on disk."""
        ...

    def matrix(
        self, shape: tuple[int, ...], sources: Sequence[Source], dtypes: Mapping[str, str]
    ) -> PackedMatrix:
        """The packed parameter on the meta device.

        Args:
            shape: (N, K) or (E, N, K).
            sources: disk matrices of one expert.
            dtypes: suffix -> dtype on disk, in safetensors' words.
        """
        ...

    def encode(self, weight: Tensor, **how: Any) -> dict[str, Tensor]:
        """Quantise a matrix (N, K): suffix -> disk tensor."""
        ...
