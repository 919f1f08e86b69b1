"""Bytes from the config alone: weights by part and format, cache rows, slots, working memory.

Weights, keys and values, states and logits are exact. Working memory counts the tensors that are
alive at the widest point of a layer; docs/planning.md has the formulas.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from qnext.config import ModelConfig
from qnext.errors import ConfigError
from qnext.weights import disk_tensors

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2,
              "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}  # fmt: skip
SCALE_BLOCK = 128  # edge of the square of weights that shares an FP8 scale
CHUNK = 64  # tokens that the chunked delta rule takes at once

# Official FP8 checkpoints convert these and keep the rest in BF16 (spec section 8.1); INT4 ones
# differ, and this is the common denominator.
_CONVERTED = re.compile(
    r"(in_proj_qkvz?|in_proj_z|out_proj|[qkvo]_proj|gate_up_proj|(gate|up|down)_proj)(\.weight)?$"
)
_PARTS = (
    (re.compile(r"^mtp\."), "mtp"),
    (re.compile(r"embed_tokens"), "embedding"),
    (re.compile(r"^lm_head"), "head"),
    (re.compile(r"norm\.weight$"), "norms"),
    (re.compile(r"\.linear_attn\."), "delta_net"),
    (re.compile(r"\.self_attn\."), "attention"),
    (re.compile(r"\.mlp\.experts\."), "experts"),
    (re.compile(r"\.mlp\.shared_expert"), "shared_expert"),
    (re.compile(r"\.mlp\.gate\."), "router"),
    (re.compile(r"\.mlp\."), "mlp"),
)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How weights are stored.

    Attributes:
        dtype: of the matrices: float32, bfloat16, float16, fp8 (128 x 128 blocks, fp32 scales) or
            int4 (groups along the input, 16-bit scales).
        expert_dtype: of the routed experts where it differs.
        group_size: inputs that share an int4 scale.
        zero_points: int4 groups have a packed zero point, as AWQ's.
    """

    dtype: str = "bfloat16"
    expert_dtype: str | None = None
    group_size: int = 32
    zero_points: bool = False

    def __post_init__(self) -> None:
        known = ("float64", "float32", "bfloat16", "float16", "fp8", "int4")
        for name in ("dtype", "expert_dtype"):
            value = getattr(self, name)
            if value not in known and not (name == "expert_dtype" and value is None):
                raise ConfigError(
                    f"{name} {value!r} is no format of weights", hint="known: " + ", ".join(known)
                )
        if type(self.group_size) is not int or self.group_size < 1:
            raise ConfigError(f"group_size {self.group_size!r} must be a positive whole number")

    @property
    def compute_dtype(self) -> str:
        """What activations, and the tensors that are not converted, are held in."""
        return self.dtype if self.dtype in ITEM_BYTES and self.dtype != "fp8" else "bfloat16"

    @property
    def name(self) -> str:
        """For a reader."""
        experts = self.expert_dtype or self.dtype
        text = self.dtype if experts == self.dtype else f"{self.dtype}, experts {experts}"
        return f"{text} (groups of {self.group_size})" if "int4" in text else text

    def matrix(self, shape: Sequence[int], *, stored: str) -> tuple[int, int, int]:
        """Bytes of (weights, scales, zero points) of stacked (..., out, in) matrices."""
        *stack, rows, columns = shape
        count = 1
        for size in stack:
            count *= size
        if stored == "fp8":
            scales = _blocks(rows, SCALE_BLOCK) * _blocks(columns, SCALE_BLOCK)
            return count * rows * columns, count * scales * 4, 0
        if stored == "int4":
            groups = _blocks(columns, self.group_size)
            zeros = _blocks(rows, 8) * 4 * groups if self.zero_points else 0
            words = rows * _blocks(columns, 8) * 4
            return count * words, count * rows * groups * 2, count * zeros
        return count * rows * columns * ITEM_BYTES[stored], 0, 0


def weight_bytes(config: ModelConfig, form: WeightFormat) -> dict[str, int]:
    """Bytes of the parameters by part; ``scales`` and ``zero_points`` are those of all parts."""
    return dict(_weight_bytes(config, form))


@lru_cache(64)  # a search for settings that fit asks thousands of times
def _weight_bytes(config: ModelConfig, form: WeightFormat) -> tuple[tuple[str, int], ...]:
    found: Counter[str] = Counter()
    wide = ITEM_BYTES[form.compute_dtype]
    for tensor in disk_tensors(config, fused_experts=True):
        if tensor.optional:
            continue
        part = next(part for pattern, part in _PARTS if pattern.search(tensor.name))
        if len(tensor.shape) < 2 or not _CONVERTED.search(tensor.name):
            found[part] += tensor.numel * wide
            continue
        experts = ".experts." in tensor.name
        stored = (form.expert_dtype if experts else None) or form.dtype
        shape = tensor.shape
        if tensor.name.endswith("gate_up_proj"):  # gate and up have scales of their own
            shape = (shape[0], 2, shape[1] // 2, shape[2])
        weights, scales, zeros = form.matrix(shape, stored=stored)
        found[part] += weights
        found["scales"] += scales
        found["zero_points"] += zeros
    order = [part for _, part in _PARTS[1:]] + ["mtp", "scales", "zero_points"]
    return tuple((part, found[part]) for part in order if found[part])


def attention_layers(config: ModelConfig) -> int:
    """Main layers that keep keys and values."""
    return config.layer_types.count("full_attention")


def delta_layers(config: ModelConfig) -> int:
    """Layers that keep a recurrent state."""
    return config.layer_types.count("linear_attention")


def kv_row_bytes(config: ModelConfig, dtype: str) -> int:
    """Keys and values of one token in one attention layer."""
    return 2 * config.num_key_value_heads * config.head_dim * ITEM_BYTES[dtype]


def conv_channels(config: ModelConfig) -> int:
    """Channels of a DeltaNet layer's convolution."""
    c = config
    return (
        2 * c.linear_num_key_heads * c.linear_key_head_dim
        + c.linear_num_value_heads * c.linear_value_head_dim
    )


def slot_bytes(config: ModelConfig, dtype: str, state_dtype: str) -> dict[str, int]:
    """One state slot: recurrent states, convolution inputs, hidden state of the last token."""
    c, layers, wide = config, delta_layers(config), ITEM_BYTES[dtype]
    state = c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim
    return {
        "recurrent": layers * state * ITEM_BYTES[state_dtype],
        "conv": layers * conv_channels(c) * (c.linear_conv_kernel_dim - 1) * wide,
        "hidden": c.hidden_size * wide,
    }


def verify_row_bytes(config: ModelConfig, dtype: str) -> int:
    """What one row under verification keeps until commit: k, v, gates and convolution inputs."""
    c, wide = config, ITEM_BYTES[dtype]
    keys = c.linear_num_key_heads * c.linear_key_head_dim * 4  # normalised in fp32
    values = c.linear_num_value_heads * c.linear_value_head_dim * wide
    gates = 2 * 4 * c.linear_num_value_heads
    return delta_layers(config) * (keys + values + gates + conv_channels(c) * wide)


def activation_row_bytes(config: ModelConfig, dtype: str, *, kernels: bool) -> dict[str, int]:
    """Tensors of one token that are alive at the widest point of each kind of layer.

    Args:
        config: the model.
        dtype: of the activations.
        kernels: the delta rule in one kernel and all experts in one call, as on a GPU; else the
            torch references, chunk by chunk and expert by expert.

    Returns:
        residual (in every layer), delta_net, attention, mlp.
    """
    c, w, hidden = config, ITEM_BYTES[dtype], config.hidden_size
    found = {"residual": 3 * hidden * w, "delta_net": 0, "attention": 0, "mlp": 0}
    if delta_layers(c):
        key = c.linear_num_key_heads * c.linear_key_head_dim
        heads, dk, dv = c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim
        value, channels = heads * dv, conv_channels(c)
        projected = (2 * channels + value) * w + 4 * heads * 4
        normed = 2 * key * 4
        if kernels:  # u, w, the written values, the outputs, and one state per chunk
            chunked = (2 * heads * dk + 2 * value) * 4 + heads * dk * dv * 4 // CHUNK
        else:  # also the squares of a chunk: scores, decays and the inverse
            chunked = (5 * heads * dk + 4 * value + 7 * heads * CHUNK) * 4
        found["delta_net"] = projected + normed + chunked + value * w
    q = c.num_attention_heads * c.head_dim
    kv = c.num_key_value_heads * c.head_dim
    found["attention"] = (4 * q + (q if c.attn_output_gate else 0) + 4 * kv) * w
    if any(not sparse for sparse in c.sparse_layers):
        found["mlp"] = (3 * c.intermediate_size + hidden) * w
    if any(c.sparse_layers):
        inner, k = c.moe_intermediate_size, c.num_experts_per_tok
        routing = c.num_experts * (w + 4) + k * (8 + 8 + 4 + w)
        # In one call: every token k times before, between and after the two products.
        rows = k * (3 * hidden + 2 * inner) if kernels else 2 * hidden + 4 * inner
        shared = 3 * c.shared_expert_intermediate_size + 2 * hidden
        found["mlp"] = max(found["mlp"], routing + (rows + shared) * w)
    return found


def logits_row_bytes(config: ModelConfig, dtype: str) -> int:
    """One row of logits: as computed, in fp32, and sorted with its order for top-k and top-p."""
    return config.vocab_size * (ITEM_BYTES[dtype] + 4 + 4 + 8)


def compiled_copy_bytes(config: ModelConfig) -> int:
    """The matrices that the fused layers lay out again.

    For decoding as bfloat16 bits, with the head even where it is tied (weights that bfloat16 cannot
    hold take twice as much); for prompts in fp32, without it (in bfloat16 half as much).
    """
    head = config.vocab_size * config.hidden_size
    tied = head if config.tie_word_embeddings else 0
    matrices = [t for t in disk_tensors(config, fused_experts=True) if len(t.shape) > 1]
    count = sum(t.numel for t in matrices if "embed_tokens" not in t.name and not t.optional)
    untied = 0 if config.tie_word_embeddings else head
    return 2 * (count + tied) + 4 * (count - untied)


def _blocks(count: int, size: int) -> int:
    return -(-count // size)
