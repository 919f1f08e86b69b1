"""From plain rules to packed ones: the disk tensors of a quantised checkpoint.

Every matrix of a linear module or an expert is decided here: plain or packed, by the config and
by the names on disk, which must agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from qnext.errors import CheckpointError, MissingTensor
from qnext.quant.config import Quantization
from qnext.quant.format import PackedTensor, Scheme, Source
from qnext.quant.fp8 import Fp8Scheme
from qnext.quant.surgery import PackedParameter
from qnext.weights import DiskTensor

SUFFIXES = (".weight_scale_inv", ".weight_scale", ".weight_packed", ".weight_zero_point",
            ".weight_shape", ".weight_g_idx", ".qweight", ".qzeros", ".scales", ".g_idx",
            "_scale_inv")  # fmt: skip
"""What follows the name of a quantised module beside ``.weight``, in any format."""


def quantised_names(names: Iterable[str]) -> list[str]:
    """Those names that only quantised modules have."""
    return [n for n in names if n.endswith(SUFFIXES)]


def module_of(tensor: DiskTensor) -> str | None:
    """Name on disk of the linear module or expert stack that a plain tensor is the weight of.

    None for tensors that no format quantises: norms, embeddings, convolutions, vectors.
    """
    name = tensor.name
    if tensor.optional or name.endswith("embed_tokens.weight"):
        return None
    if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        return name
    if name.endswith(".weight") and len(tensor.shape) == 2:
        return name.removesuffix(".weight")
    return None


def pack_rules(
    rules: Iterable[DiskTensor], quantization: Quantization, dtypes: Mapping[str, str] | None
) -> tuple[dict[str, DiskTensor], dict[str, PackedParameter]]:
    """Rules of a quantised checkpoint.

    Args:
        rules: of the plain one.
        quantization: what the config says.
        dtypes: name on disk -> dtype; None where only the config is known. Values may be "".

    Returns:
        (rules by name, packed parameters by name).

    Raises:
        CheckpointError: config and names disagree about a module, or no names are known for it.
        ConfigError: a list that names part of a fused module, an impossible group size.
    """
    table: dict[str, DiskTensor] = {}
    packed: dict[str, PackedParameter] = {}
    chosen: dict[tuple[str, int | None], list[tuple[str, Scheme | None]]] = {}
    for rule in rules:
        stem = module_of(rule)
        scheme = None if stem is None else _decide(stem, rule, quantization, dtypes)
        if stem is not None:
            for param in dict.fromkeys((p.param, p.index) for p in rule.parts):
                chosen.setdefault(param, []).append((stem, scheme))
        if stem is None or scheme is None:
            table[rule.name] = rule
            continue
        pieces = list(_pieces(stem, rule, scheme, chosen))
        table.update({piece.name: piece for piece in pieces})
        _register(packed, stem, rule, scheme, pieces, dtypes or {})
    _check_uniform(chosen)
    return table, packed


def _decide(
    stem: str, rule: DiskTensor, quantization: Quantization, dtypes: Mapping[str, str] | None
) -> Scheme | None:
    scheme = quantization.scheme(stem)
    if dtypes is None:
        if scheme is not None and quantization.may_be_plain(stem):
            return None if stem.rpartition(".")[2] in ("lm_head", "gate", "fc") else scheme
        return scheme
    found = [stem + s for s in SUFFIXES if stem + s in dtypes]
    if not found and dtypes.get(rule.name, "").startswith("F8"):
        found = [rule.name]
    method = quantization.method
    if scheme is None:
        if found:
            raise CheckpointError(
                f"{stem} stays unquantised by the lists in quantization_config ({method}), yet "
                f"the files hold {found[0]}",
                hint="the list and the weights come from different exports",
            )
        return None
    if found:
        return scheme
    if rule.name not in dtypes or quantization.may_be_plain(stem):
        return None if rule.name in dtypes else scheme
    raise MissingTensor(
        f"{stem} should be quantised ({scheme.label}) by quantization_config, yet the files hold "
        f"a plain {rule.name} and no scale",
        hint="a scale is missing, or the list of unquantised modules is incomplete",
    )


def _pieces(
    stem: str,
    rule: DiskTensor,
    scheme: Scheme,
    chosen: Mapping[tuple[str, int | None], list[tuple[str, Scheme | None]]],
) -> Iterator[PackedTensor]:
    stacked = len(rule.shape) == 3
    if stacked and not isinstance(scheme, Fp8Scheme):
        raise CheckpointError(
            f"{stem} is stacked over experts on disk, which {scheme.label} has no names for",
            hint="only FP8 is known stacked; store the experts one by one",
        )
    first = rule.parts[0]
    span = [s for s, _ in chosen[first.param, first.index]].index(stem)
    for piece in scheme.pieces(rule.shape):
        suffix = piece.suffix.removeprefix(".weight") if stacked else piece.suffix
        yield PackedTensor(
            stem + suffix, piece.shape, rule.parts, piece=piece, rows=rule.shape[-2], span=span
        )


def _register(
    packed: dict[str, PackedParameter],
    stem: str,
    rule: DiskTensor,
    scheme: Scheme,
    pieces: list[PackedTensor],
    dtypes: Mapping[str, str],
) -> None:
    """Note the sources of each parameter; of stacked experts only those of the first."""
    kinds = {p.piece.suffix: dtypes.get(p.name) or p.piece.dtypes[-1] for p in pieces}
    for part in rule.parts:
        if part.index:
            continue
        source = Source(stem, part, rule.shape[-2])
        known = packed.get(part.param)
        sources = [source] if known is None else [*known.sources, source]
        packed[part.param] = PackedParameter(scheme, sources, kinds)


def _check_uniform(
    chosen: Mapping[tuple[str, int | None], list[tuple[str, Scheme | None]]],
) -> None:
    """One parameter, one scheme: neither gate without up nor one expert without the others."""
    seen: dict[str, tuple[str, Scheme | None]] = {}
    for (param, _), choices in chosen.items():
        for stem, scheme in choices:
            first, kind = seen.setdefault(param, (stem, scheme))
            if kind != scheme:
                label, other = (s.label if s else "plain" for s in (kind, scheme))
                raise CheckpointError(
                    f"{first} is {label} and {stem} is {other}, but both are parts of {param}",
                    hint="qnext stacks these matrices, so they need one format",
                )
