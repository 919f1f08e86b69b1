"""The algebra of checkpoint names: which tensor on disk is which part of which parameter.

Each tensor on disk is a set of ``Part``s. A part is a pair of views of equal shape, one into
the disk tensor and one into the parameter; loading copies one way, saving the other, so every
rule is invertible by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

from torch import Tensor

from qnext.config import ModelConfig

View = Callable[[Tensor], Tensor]


def whole(x: Tensor) -> Tensor:
    """The view that leaves nothing out."""
    return x


@dataclass(frozen=True)
class Span:
    """``count`` rows from ``begin`` on, split into ``groups`` of equal size (1: not split)."""

    begin: int
    count: int
    groups: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        """(N, ...) -> (count, ...) or (groups, count / groups, ...)."""
        rows = x[self.begin : self.begin + self.count]
        return rows.unflatten(0, (self.groups, -1)) if self.groups > 1 else rows


@dataclass(frozen=True)
class GroupRows:
    """The same ``count`` rows from ``begin`` on of each of ``groups`` groups of rows."""

    groups: int
    begin: int
    count: int

    def __call__(self, x: Tensor) -> Tensor:
        """(N, ...) -> (groups, count, ...), or (count, ...) of the only group."""
        rows = x.unflatten(0, (self.groups, -1))[:, self.begin : self.begin + self.count]
        return rows if self.groups > 1 else rows[0]


@dataclass(frozen=True)
class Part:
    """``param`` seen through ``put`` equals the disk tensor seen through ``take``.

    Views of rows look at the first axis only, so they serve whatever has one entry per row of
    the matrix (packed words, scales) as well as the matrix.

    Attributes:
        param: name of the parameter.
        rows: view of the parameter, or of entry ``index`` of it.
        take: view of the disk tensor.
        index: expert that the disk tensor belongs to, for stacked parameters.
    """

    param: str
    rows: View = whole
    take: View = whole
    index: int | None = None

    def put(self, param: Tensor) -> Tensor:
        """The place in the parameter, or in anything with its axes of experts and rows."""
        return self.rows(param if self.index is None else param[self.index])


@dataclass(frozen=True)
class DiskTensor:
    """One tensor of a checkpoint.

    Attributes:
        name: its name in the files.
        shape: its shape there.
        parts: where its contents live in the model.
        optional: may be absent; if present it must equal the parameter it repeats.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    optional: bool = False

    @property
    def numel(self) -> int:
        """Elements in the tensor."""
        return prod(self.shape)


def disk_tensors(
    config: ModelConfig, *, prefix: str = "model.", fused_experts: bool = False
) -> Iterator[DiskTensor]:
    """Every tensor of a checkpoint of this model, as its family stores them.

    Args:
        config: the model.
        prefix: of the backbone, ``model.`` or ``model.language_model.``.
        fused_experts: stacked ``experts.gate_up_proj`` instead of one matrix per expert.
    """
    c, hidden = config, config.hidden_size
    yield _plain(f"{prefix}embed_tokens.weight", "model.embed_tokens.weight", c.vocab_size, hidden)
    for i, kind in enumerate(c.layer_types):
        yield from _layer(
            c, f"{prefix}layers.{i}.", f"model.layers.{i}.", kind, c.is_sparse(i), fused_experts
        )
    yield _plain(f"{prefix}norm.weight", "model.norm.weight", hidden)
    if c.tie_word_embeddings:
        part = Part("model.embed_tokens.weight")
        yield DiskTensor("lm_head.weight", (c.vocab_size, hidden), (part,), optional=True)
    else:
        yield _plain("lm_head.weight", "lm_head.weight", c.vocab_size, hidden)
    if c.num_mtp_layers:
        yield _plain("mtp.fc.weight", "mtp.fc.weight", hidden, 2 * hidden)
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            yield _plain(f"mtp.{name}.weight", f"mtp.{name}.weight", hidden)
        sparse = c.num_experts > 0
        yield from _layer(
            c, "mtp.layers.0.", "mtp.layers.0.", "full_attention", sparse, fused_experts
        )


def _plain(disk: str, param: str, *shape: int) -> DiskTensor:
    return DiskTensor(disk, shape, (Part(param),))


def _layer(
    c: ModelConfig, disk: str, param: str, kind: str, sparse: bool, fused: bool
) -> Iterator[DiskTensor]:
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield _plain(f"{disk}{name}.weight", f"{param}{name}.weight", c.hidden_size)
    if kind == "full_attention":
        yield from _attention(c, disk + "self_attn.", param + "self_attn.")
    else:
        yield from _delta_net(c, disk + "linear_attn.", param + "linear_attn.")
    if sparse:
        yield from _moe(c, disk + "mlp.", param + "mlp.", fused)
    else:
        yield from _mlp(c.hidden_size, c.intermediate_size, disk + "mlp.", param + "mlp.")


def _attention(c: ModelConfig, disk: str, param: str) -> Iterator[DiskTensor]:
    q_rows = c.num_attention_heads * c.head_dim
    kv_rows = c.num_key_value_heads * c.head_dim
    rows = {
        "q_proj": q_rows * (2 if c.attn_output_gate else 1),
        "k_proj": kv_rows,
        "v_proj": kv_rows,
    }
    for name, count in rows.items():
        yield _plain(f"{disk}{name}.weight", f"{param}{name}.weight", count, c.hidden_size)
        if c.attention_bias:
            yield _plain(f"{disk}{name}.bias", f"{param}{name}.bias", count)
    yield _plain(f"{disk}o_proj.weight", f"{param}o_proj.weight", c.hidden_size, q_rows)
    if c.attention_bias:
        yield _plain(f"{disk}o_proj.bias", f"{param}o_proj.bias", c.hidden_size)
    for name in ("q_norm", "k_norm"):
        yield _plain(f"{disk}{name}.weight", f"{param}{name}.weight", c.head_dim)


def _delta_net(c: ModelConfig, disk: str, param: str) -> Iterator[DiskTensor]:
    hk, hv = c.linear_num_key_heads, c.linear_num_value_heads
    dk, dv = c.linear_key_head_dim, c.linear_value_head_dim
    key, value, width = hk * dk, hv * dv, c.hidden_size
    if c.model_type == "qwen3_next":
        yield from _interleaved(hk, hv // hk, dk, dv, width, disk, param)
    else:
        yield _plain(
            disk + "in_proj_qkv.weight", param + "in_proj_qkv.weight", 2 * key + value, width
        )
        yield _plain(disk + "in_proj_z.weight", param + "in_proj_z.weight", value, width)
        for name in ("in_proj_b", "in_proj_a"):
            yield _plain(f"{disk}{name}.weight", f"{param}{name}.weight", hv, width)
    yield _plain(
        disk + "conv1d.weight",
        param + "conv1d.weight",
        2 * key + value,
        1,
        c.linear_conv_kernel_dim,
    )
    for name in ("A_log", "dt_bias"):
        yield _plain(disk + name, param + name, hv)
    yield _plain(disk + "norm.weight", param + "norm.weight", dv)
    yield _plain(disk + "out_proj.weight", param + "out_proj.weight", width, value)


def _interleaved(
    hk: int, r: int, dk: int, dv: int, width: int, disk: str, param: str
) -> Iterator[DiskTensor]:
    """Qwen3-Next's row order (spec section 4.1).

    Per key head: q, k, then v and z of its r value heads; and b, a of its r value heads.
    """
    key, value, group = hk * dk, hk * r * dv, 2 * dk + 2 * r * dv

    rows, block = partial(GroupRows, hk), partial(Span, groups=hk)
    qkv, z = param + "in_proj_qkv.weight", param + "in_proj_z.weight"
    yield DiskTensor(
        disk + "in_proj_qkvz.weight",
        (hk * group, width),
        (
            Part(qkv, block(0, key), rows(0, dk)),
            Part(qkv, block(key, key), rows(dk, dk)),
            Part(qkv, block(2 * key, value), rows(2 * dk, r * dv)),
            Part(z, block(0, value), rows(2 * dk + r * dv, r * dv)),
        ),
    )
    yield DiskTensor(
        disk + "in_proj_ba.weight",
        (2 * hk * r, width),
        (
            Part(param + "in_proj_b.weight", block(0, hk * r), rows(0, r)),
            Part(param + "in_proj_a.weight", block(0, hk * r), rows(r, r)),
        ),
    )


def _mlp(hidden: int, inner: int, disk: str, param: str) -> Iterator[DiskTensor]:
    for name in ("gate_proj", "up_proj"):
        yield _plain(f"{disk}{name}.weight", f"{param}{name}.weight", inner, hidden)
    yield _plain(f"{disk}down_proj.weight", f"{param}down_proj.weight", hidden, inner)


def _moe(c: ModelConfig, disk: str, param: str, fused: bool) -> Iterator[DiskTensor]:
    hidden, inner, num = c.hidden_size, c.moe_intermediate_size, c.num_experts
    yield _plain(disk + "gate.weight", param + "gate.weight", num, hidden)
    gate_up, down = param + "experts.gate_up_proj", param + "experts.down_proj"
    if fused:
        yield _plain(disk + "experts.gate_up_proj", gate_up, num, 2 * inner, hidden)
        yield _plain(disk + "experts.down_proj", down, num, hidden, inner)
    else:
        for e in range(num):
            stem = f"{disk}experts.{e}."
            for j, name in enumerate(("gate_proj", "up_proj")):
                part = Part(gate_up, Span(j * inner, inner), index=e)
                yield DiskTensor(f"{stem}{name}.weight", (inner, hidden), (part,))
            part = Part(down, index=e)
            yield DiskTensor(f"{stem}down_proj.weight", (hidden, inner), (part,))
    if c.shared_expert_intermediate_size:
        yield from _mlp(
            hidden,
            c.shared_expert_intermediate_size,
            disk + "shared_expert.",
            param + "shared_expert.",
        )
        yield _plain(
            disk + "shared_expert_gate.weight", param + "shared_expert_gate.weight", 1, hidden
        )
