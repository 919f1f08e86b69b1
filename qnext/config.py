"""ModelConfig: one strict description of every model that the layers can build.

It reads published ``config.json`` files of Qwen3-Next, Qwen3.5 (text part), Qwen3 and Qwen3-MoE
in both RoPE spellings, and writes files that transformers 4.57 and 5.x read alike.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qnext.errors import ConfigError

LayerKind = Literal["linear_attention", "full_attention"]
ModelType = Literal["qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3", "qwen3_moe"]

ARCHITECTURES: dict[str, str] = {
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# Far above any model; a damaged file must not make us count to a billion.
MAX_LAYERS, MAX_EXPERTS = 1000, 8192
HYBRID = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
SPARSE = ("qwen3_next", "qwen3_5_moe", "qwen3_moe")

# Keys of published files that change nothing here.
_IGNORED = (
    "architectures attention_dropout attn_implementation auto_map chunk_size_feed_forward "
    "decoder_sparse_step dtype experts_implementation full_attention_interval hidden_act id2label "
    "image_token_id initializer_range is_decoder is_encoder_decoder label2id language_model_only "
    "mamba_ssm_dtype max_window_layers mlp_only_layers model_type mtp_use_dedicated_embeddings "
    "name_or_path _name_or_path num_nextn_predict_layers mtp_num_hidden_layers num_mtp_layers "
    "output_attentions output_hidden_states output_router_logits problem_type quantization_config "
    "return_dict rope_parameters rope_scaling rope_theta partial_rotary_factor "
    "router_aux_loss_coef sliding_window text_config torch_dtype transformers_version use_cache "
    "use_sliding_window video_token_id vision_config vision_end_token_id vision_start_token_id "
    "mtp_loss_weight"
)
IGNORED = frozenset(_IGNORED.split())


class Yarn(BaseModel):
    """YaRN: how the rotary frequencies are stretched (spec section 7)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(gt=0)
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0


class ModelConfig(BaseModel):
    """Everything that decides the shapes and the arithmetic of a model; Hugging Face names.

    Sizes are counts or channels. ``layer_types`` and ``sparse_layers`` are written out, one
    entry per layer. ``rope_scaling`` is None for plain RoPE.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model_type: ModelType
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0, le=MAX_LAYERS)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    attention_bias: bool = False
    attn_output_gate: bool = True
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    max_position_embeddings: int = Field(gt=0)
    rope_theta: float = Field(gt=0)
    partial_rotary_factor: float = Field(gt=0, le=1)
    rope_scaling: Yarn | None = None
    layer_types: tuple[LayerKind, ...]
    sparse_layers: tuple[bool, ...]
    linear_num_key_heads: int = Field(default=0, ge=0)
    linear_num_value_heads: int = Field(default=0, ge=0)
    linear_key_head_dim: int = Field(default=0, ge=0)
    linear_value_head_dim: int = Field(default=0, ge=0)
    linear_conv_kernel_dim: int = Field(default=4, ge=2)
    num_experts: int = Field(default=0, ge=0, le=MAX_EXPERTS)
    num_experts_per_tok: int = Field(default=0, ge=0)
    moe_intermediate_size: int = Field(default=0, ge=0)
    shared_expert_intermediate_size: int = Field(default=0, ge=0)
    norm_topk_prob: bool = True
    intermediate_size: int = Field(default=0, ge=0)
    tie_word_embeddings: bool = False
    num_mtp_layers: int = Field(default=0, ge=0, le=1)
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @model_validator(mode="after")
    def _shapes(self) -> ModelConfig:
        def need(claim: bool, message: str) -> None:
            if not claim:
                raise ValueError(message)

        heads, kv = self.num_attention_heads, self.num_key_value_heads
        need(
            heads % kv == 0,
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv}",
        )
        layers = self.num_hidden_layers
        need(
            len(self.layer_types) == layers,
            f"layer_types has {len(self.layer_types)} entries for {layers} layers",
        )
        need(
            len(self.sparse_layers) == layers,
            f"sparse_layers has {len(self.sparse_layers)} entries for {layers} layers",
        )
        need(
            self.rotary_dim >= 2 and self.rotary_dim % 2 == 0,
            f"head_dim {self.head_dim} times partial_rotary_factor {self.partial_rotary_factor} "
            "must give an even number of channels, at least 2",
        )
        if "linear_attention" in self.layer_types:
            need(self.model_type in HYBRID, f"{self.model_type} has no linear_attention layers")
            for name in (
                "linear_num_key_heads",
                "linear_num_value_heads",
                "linear_key_head_dim",
                "linear_value_head_dim",
            ):
                need(getattr(self, name) > 0, f"{name} is needed by the linear_attention layers")
            hk, hv = self.linear_num_key_heads, self.linear_num_value_heads
            need(
                hv % hk == 0,
                f"linear_num_value_heads {hv} is no multiple of linear_num_key_heads {hk}",
            )
        if any(self.sparse_layers):
            for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
                need(getattr(self, name) > 0, f"{name} is needed by the sparse layers")
            need(
                self.num_experts_per_tok <= self.num_experts,
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts "
                f"{self.num_experts}",
            )
        if not all(self.sparse_layers):
            need(self.intermediate_size > 0, "intermediate_size is needed by the dense layers")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, tuple) else (value,):
                need(
                    token is None or 0 <= token < self.vocab_size,
                    f"{name} {token} is outside the vocabulary of {self.vocab_size}",
                )
        return self

    @property
    def zero_centred_norms(self) -> bool:
        """Whether norm weights are stored as the distance from one; Qwen3 stores them plain."""
        return self.model_type in HYBRID

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids as a tuple."""
        eos = self.eos_token_id
        return () if eos is None else eos if isinstance(eos, tuple) else (eos,)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.sparse_layers[layer]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Read the contents of a ``config.json``.

        Raises:
            ConfigError: an unknown model or field, a missing field, an impossible shape.
        """
        return _read(data)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ModelConfig:
        """Read ``config.json`` of a checkpoint folder.

        Raises:
            ConfigError: no such file, not JSON, or not a config we can build.
        """
        path = Path(folder) / "config.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(
                f"{path} does not exist", hint="a checkpoint folder needs a config.json"
            ) from error
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, giant numbers
            raise ConfigError(f"{path} is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path} holds a {type(data).__name__}, not an object")
        return cls.from_dict(data)

    def to_hf_dict(self) -> dict[str, Any]:
        """The ``config.json`` contents that transformers 4.57 and 5.x read alike."""
        return _write(self)


def _read(data: dict[str, Any]) -> ModelConfig:
    outer = data
    kind = data.get("model_type")
    if isinstance(data.get("text_config"), dict):
        # Qwen3.5: the language model is nested beside a vision part that we leave out.
        data = dict(data["text_config"])
        for key in ("tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id"):
            if key in outer and data.get(key) is None:
                data[key] = outer[key]
        kind = kind or data.get("model_type")
    if isinstance(kind, str):
        kind = kind.removesuffix("_text")
    if "num_local_experts" in data:  # how transformers 5 writes it for Qwen3-MoE
        data = {"num_experts": data["num_local_experts"], **data}
        del data["num_local_experts"]
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ConfigError(
            f"model_type {kind!r} is not known",
            hint="known: " + ", ".join(ARCHITECTURES),
        )
    _refuse_unknown(data)
    hybrid, sparse = kind in HYBRID, kind in SPARSE
    fields: dict[str, Any] = {
        k: v for k, v in data.items() if k in ModelConfig.model_fields and k not in IGNORED
    }
    fields["model_type"] = kind
    for key in ("attention_dropout",):
        if data.get(key):
            raise ConfigError(f"{key} {data[key]} is not supported; published models use 0")
    if data.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act {data['hidden_act']!r} is not supported, only 'silu'")
    if data.get("use_sliding_window"):
        raise ConfigError("use_sliding_window is not supported; published models do not use it")

    layers = _integer(data, "num_hidden_layers")
    if layers > MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers is {layers}; at most {MAX_LAYERS} are supported")
    if not hybrid:
        fields.setdefault("attn_output_gate", False)
        fields = {k: v for k, v in fields.items() if not k.startswith("linear_")}
    if isinstance(data.get("layer_types"), list):
        fields["layer_types"] = tuple(data["layer_types"])
    if data.get("layer_types") is None:
        interval = _integer(data, "full_attention_interval", 4 if hybrid else 1)
        fields["layer_types"] = tuple(
            "full_attention" if (i + 1) % interval == 0 else "linear_attention"
            for i in range(layers)
        )
    if sparse:
        step = _integer(data, "decoder_sparse_step", 1)
        dense = data.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(i) is int for i in dense):
            raise ConfigError(f"mlp_only_layers is {dense!r}; it must be a list of layer numbers")
        fields["sparse_layers"] = tuple(
            i not in dense and bool(data.get("num_experts")) and (i + 1) % step == 0
            for i in range(layers)
        )
    else:
        fields["sparse_layers"] = (False,) * layers
        for key in (
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "norm_topk_prob",
        ):
            fields.pop(key, None)
    if kind == "qwen3_moe" and fields.pop("shared_expert_intermediate_size", None):
        raise ConfigError("qwen3_moe has no shared expert, yet shared_expert_intermediate_size "
                          f"is {data['shared_expert_intermediate_size']!r}")  # fmt: skip
    if kind == "qwen3_5_moe":
        fields["norm_topk_prob"] = True  # the code of this family always renormalises
    elif sparse and data.get("norm_topk_prob") is None:
        raise ConfigError(
            "norm_topk_prob is missing", hint="published files of this family all state it"
        )
    if data.get("head_dim") is None:
        raise ConfigError(
            "head_dim is missing", hint="it is not hidden_size / num_attention_heads here"
        )
    fields.update(_read_rope(data, kind))
    fields["num_mtp_layers"] = _first(
        data, "num_mtp_layers", "mtp_num_hidden_layers", "num_nextn_predict_layers"
    )
    if isinstance(fields.get("eos_token_id"), list):
        fields["eos_token_id"] = tuple(fields["eos_token_id"])
    try:
        return ModelConfig(**{k: v for k, v in fields.items() if v is not None})
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def _read_rope(data: dict[str, Any], kind: str) -> dict[str, Any]:
    """Both spellings: top-level keys with ``rope_scaling``, or one ``rope_parameters``."""
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(data.get(name) or {}, dict):
            raise ConfigError(f"{name} is {data[name]!r}; it must be an object")
    rope = dict(data.get("rope_parameters") or {})
    scaling = dict(data.get("rope_scaling") or {})
    for name in ("rope_theta", "partial_rotary_factor"):
        here, there = rope.get(name), data.get(name)
        if here is not None and there is not None and here != there:
            raise ConfigError(f"{name} is {there!r} at the top level and {here!r} in "
                              "rope_parameters")  # fmt: skip
    inner, outer = rope.pop("rope_theta", None), data.get("rope_theta")
    theta = inner if inner is not None else outer
    if theta is None:
        raise ConfigError(
            "rope_theta is missing", hint="give it at the top level or in rope_parameters"
        )
    default = 1.0 if kind in ("qwen3", "qwen3_moe") else 0.25
    choices = (rope.pop("partial_rotary_factor", None), data.get("partial_rotary_factor"), default)
    part = next(c for c in choices if c is not None)
    merged = {**rope, **scaling}
    kind_of = merged.pop("rope_type", None) or merged.pop("type", None) or "default"
    merged.pop("type", None)
    # Text-only positions: the three M-RoPE streams are equal, so it is ordinary RoPE.
    for key in ("mrope_section", "mrope_interleaved"):
        merged.pop(key, None)
    yarn = None
    if kind_of == "yarn":
        merged.setdefault("original_max_position_embeddings", data.get("max_position_embeddings"))
        try:
            yarn = Yarn(**merged)
        except ValidationError as error:
            raise ConfigError("rope_scaling: " + _explain(error)) from error
    elif kind_of != "default":
        raise ConfigError(f"rope type {kind_of!r} is not known", hint="known: default, yarn")
    elif merged:
        raise ConfigError(f"rope_parameters has unknown keys: {', '.join(sorted(merged))}")
    return {"rope_theta": theta, "partial_rotary_factor": part, "rope_scaling": yarn}


def _write(config: ModelConfig) -> dict[str, Any]:
    hybrid = config.model_type in HYBRID
    c, eos = config, config.eos_token_id
    data: dict[str, Any] = {
        "architectures": [ARCHITECTURES[c.model_type]],
        "model_type": c.model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "attention_bias": c.attention_bias,
        "attention_dropout": 0.0,
        "rms_norm_eps": c.rms_norm_eps,
        "max_position_embeddings": c.max_position_embeddings,
        "intermediate_size": c.intermediate_size,
        "tie_word_embeddings": c.tie_word_embeddings,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": c.pad_token_id,
        "use_cache": True,
        "layer_types": list(c.layer_types),
    }
    if hybrid:
        for name in (
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_conv_kernel_dim",
        ):
            data[name] = getattr(c, name)
    else:
        data.update(
            use_sliding_window=False, sliding_window=None, max_window_layers=c.num_hidden_layers
        )
    if c.model_type in SPARSE:
        data.update(
            num_experts=c.num_experts,
            num_experts_per_tok=c.num_experts_per_tok,
            moe_intermediate_size=c.moe_intermediate_size,
            norm_topk_prob=c.norm_topk_prob,
            decoder_sparse_step=1,
            mlp_only_layers=[i for i, s in enumerate(c.sparse_layers) if not s],
        )
        if hybrid:
            data["shared_expert_intermediate_size"] = c.shared_expert_intermediate_size
    if c.num_mtp_layers:
        newer = c.model_type.startswith("qwen3_5")
        data["mtp_num_hidden_layers" if newer else "num_nextn_predict_layers"] = 1
    # transformers 4.57 reads the first three keys only, 5.x reads either spelling.
    data["rope_theta"] = c.rope_theta
    if hybrid or c.partial_rotary_factor != 1:
        data["partial_rotary_factor"] = c.partial_rotary_factor
    if c.attn_output_gate != hybrid:
        data["attn_output_gate"] = c.attn_output_gate
    scaling = None
    if c.rope_scaling is not None:
        scaling = {"rope_type": "yarn", **c.rope_scaling.model_dump(exclude_none=True)}
    data["rope_scaling"] = scaling
    if c.model_type.startswith("qwen3_5"):
        del data["rope_scaling"], data["rope_theta"], data["partial_rotary_factor"]
        data["rope_parameters"] = {
            "rope_type": "default",
            **(scaling or {}),
            "rope_theta": c.rope_theta,
            "partial_rotary_factor": c.partial_rotary_factor,
            "mrope_section": _mrope(c.rotary_dim // 2),
            "mrope_interleaved": True,
        }
        data["model_type"] += "_text"
    return data


def _mrope(half: int) -> list[int]:
    """Three sections that share the rotary channels as evenly as the published 11, 11, 10."""
    return [(half + 2) // 3, (half + 1) // 3, half // 3]


def _refuse_unknown(data: dict[str, Any]) -> None:
    known = (set(ModelConfig.model_fields) | IGNORED) - {"sparse_layers"}
    for key in data:
        if key not in known and not key.startswith("_"):
            near = difflib.get_close_matches(key, known, 1)
            raise ConfigError(
                f"config key {key!r} is not known",
                hint=f"did you mean {near[0]!r}?" if near else "remove it if it has no effect",
            )


def _integer(data: dict[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; ``default`` where the key is absent or null."""
    value = data.get(key, default)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"{key} is missing")
    if type(value) is not int or value <= 0:
        raise ConfigError(f"{key} is {value!r}; it must be a positive whole number")
    return value


def _first(data: dict[str, Any], *keys: str) -> Any:
    return next((data[k] for k in keys if data.get(k) is not None), 0)


def _explain(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        name = ".".join(str(p) for p in item["loc"])
        if item["type"] == "missing":
            parts.append(f"{name} is missing")
        elif item["type"] == "value_error" or not name:
            parts.append(str(item["msg"]).removeprefix("Value error, "))
        else:
            parts.append(f"{name} is {item['input']!r}: {item['msg']}")
    return "; ".join(parts)
