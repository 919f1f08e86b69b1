"""Exchange modules of a built tree for quantised ones, before memory is filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from qnext.errors import CheckpointError, ConfigError
from qnext.layers.moe import Experts
from qnext.quant.format import Scheme, Source
from qnext.quant.matrix import PackedMatrix
from qnext.quant.modules import QuantExperts, QuantLinear


@dataclass(frozen=True)
class PackedParameter:
    """How one parameter of the model is packed.

    Attributes:
        scheme: of every disk matrix that it is made of.
        sources: those disk matrices; of stacked experts, the ones of a single expert.
        dtypes: suffix -> dtype on disk.
    """

    scheme: Scheme
    sources: Sequence[Source]
    dtypes: Mapping[str, str]


def apply(model: nn.Module, packed: Mapping[str, PackedParameter]) -> None:
    """Exchange what holds the named parameters.

    Args:
        model: on the meta device.
        packed: parameter name -> its packed form.

    Raises:
        CheckpointError: a parameter that no linear module or expert stack holds.
    """
    owners: dict[str, dict[str, PackedMatrix]] = {}
    for name, parameter in packed.items():
        owner, _, leaf = name.rpartition(".")
        shape = tuple(model.get_parameter(name).shape)
        matrix = parameter.scheme.matrix(shape, parameter.sources, parameter.dtypes)
        owners.setdefault(owner, {})[leaf] = matrix
    for owner, matrices in owners.items():
        old = model.get_submodule(owner)
        new: nn.Module
        if isinstance(old, nn.Linear):
            new = QuantLinear(matrices["weight"], old.bias)
        elif isinstance(old, Experts):
            new = QuantExperts(matrices.get("gate_up_proj", old.gate_up_proj),
                               matrices.get("down_proj", old.down_proj))  # fmt: skip
        else:
            raise CheckpointError(f"{owner} is no module that can be quantised")
        parent, _, leaf = owner.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)


def matrices(model: nn.Module) -> dict[str, PackedMatrix]:
    """Every packed matrix by the name of the parameter that it stands for."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedMatrix)}


def refuse_quantised(model: nn.Module, what: str) -> None:
    """Raise if a model is quantised.

    Raises:
        ConfigError: it is, and ``what`` needs plain weights.
    """
    if matrices(model):
        raise ConfigError(
            f"{what} needs plain weights, and this model is quantised",
            hint="`qnext convert` writes a bfloat16 copy",
        )
