"""``qnext inspect``, ``pull`` and ``convert``: checkpoint folders."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli.session import short
from qnext.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from qnext.checkpoint.census import Layout
    from qnext.config import ModelConfig

# Bytes per parameter of the matrices; embeddings, router, gates and vectors stay bfloat16.
PRECISIONS = {"bfloat16": 2.0, "float8, 128x128 scales": 1 + 4 / 128**2, "int4, group 32": 0.5625}


def inspect(
    model: Annotated[str | None, typer.Argument(help="Folder, config.json or hub id.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    offline: Annotated[bool, typer.Option(help="Use only what is downloaded.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Census of a model: parameters in all and active, layers, bytes per precision.

    Of a hub id only the config and the index are fetched. Weights that are there are checked
    name by name against the config.
    """
    facts = _facts(*_find(model, revision, offline))
    if as_json:
        typer.echo(json.dumps(facts))
        return
    rows = {
        "model": facts["model"],
        "type": facts["model_type"],
        "parameters": f"{facts['parameters']:,}",
        "active per token": f"{facts['active_parameters']:,} ({facts['active_share']:.1%})",
        "without the embeddings": f"{facts['active_body_parameters']:,} of "
        f"{facts['body_parameters']:,} ({facts['active_body_share']:.1%})",
        "as a name rounds it": f"{facts['size_name']} ({facts['size_name_share']:.2%})",
        "MTP parameters": f"{facts['mtp_parameters']:,}",
        "layers": ", ".join(f"{n} {kind}" for kind, n in facts["layers"].items()),
        "experts": facts["experts"] or "none",
        "context": f"{facts['max_position_embeddings']:,} tokens",
        "KV per token": f"{facts['kv_bytes_per_token']:,} bytes (bfloat16)",
        "state per sequence": f"{facts['state_bytes_per_sequence']:,} bytes",
        "tensors": f"{facts['tensors']:,} ({facts['weights']})",
    }
    if facts["quantization"]:
        rows["quantised"] = f"{facts['quantized_parameters']:,} parameters, "
        rows["quantised"] += facts["quantization"]
    for name, size in facts["bytes"].items():
        rows[f"weights in {name}"] = f"{size / 1e9:,.3f} GB"
    for name, value in rows.items():
        typer.echo(f"{name:34} {value}")


def pull(
    model: Annotated[str, typer.Argument(help="org/name, modelscope:org/name or kaggle:...")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit to pin.")] = None,
    local_dir: Annotated[Path | None, typer.Option(help="Put the files here.")] = None,
    mtp_only: Annotated[bool, typer.Option(help="Only the shards that hold mtp.*.")] = False,
    offline: Annotated[bool, typer.Option(help="Only look for what is downloaded.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Download a model: safetensors, config, tokenizer, licence; never code or pickle."""
    from qnext.hub import pull as fetch

    done = fetch(
        model,
        revision=revision,
        local_dir=local_dir,
        mtp_only=mtp_only,
        offline=offline,
        progress=True,
    )
    if as_json:
        row = {
            "path": str(done.path),
            "files": list(done.files),
            "bytes": done.bytes,
            "revision": done.revision,
        }
        typer.echo(json.dumps(row))
    else:
        typer.echo(str(done.path))


def convert(
    source: Annotated[str, typer.Argument(help="Folder or hub id.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    dtype: Annotated[str, typer.Option(help="auto keeps it; bfloat16, float16, float32.")] = "auto",
    fused_experts: Annotated[
        bool | None,
        typer.Option(help="Stacked experts or one matrix per expert; default: as it is."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Such as 500MB or 5GB.")] = "5GB",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    offline: Annotated[bool, typer.Option(help="Use only what is downloaded.")] = False,
    force: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
) -> None:
    """Rewrite a checkpoint in another dtype, expert storage or sharding; dequantise it."""
    from qnext.checkpoint import load_model, save_model
    from qnext.checkpoint.census import read_layout
    from qnext.checkpoint.load import parse_dtype
    from qnext.checkpoint.reader import SafetensorsFolder
    from qnext.hub import resolve_model

    size, wanted = parse_size(max_shard_size), parse_dtype(dtype)
    folder = resolve_model(source, revision=revision, offline=offline)
    check_target(folder, target, force)
    if fused_experts is None:
        fused_experts = read_layout(SafetensorsFolder(folder)).fused_experts
    model = load_model(folder, dtype="auto", device="cpu")
    save_model(
        model,
        target,
        dtype=wanted,
        max_shard_size=size,
        fused_experts=fused_experts,
        extra_files=folder,
    )
    typer.echo(str(target))


def check_target(source: Path, target: Path, force: bool) -> None:
    """Refuse to write over the source, a file, or a folder with something in it.

    Raises:
        ConfigError: one of those.
    """
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is not a folder", hint="choose another target")
    if target.exists() and target.resolve() == source.resolve():
        raise ConfigError(f"source and target are both {target}", hint="write to another folder")
    if target.exists() and any(target.iterdir()) and not force:
        raise ConfigError(f"{target} is not empty", hint="choose another folder, or pass --force")


def parse_size(text: str) -> int:
    """Bytes of ``500MB`` or ``5GB`` (decimal units).

    Raises:
        ConfigError: not such a text.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"size {text!r} is not of the form 500MB or 5GB", hint="units are KB, MB and GB"
        ) from error
    if size < 1:
        raise ConfigError(f"size {text!r} must be positive", hint="give 500MB, say")
    return size


def _find(model: str | None, revision: str | None, offline: bool) -> tuple[Path, Path | None]:
    """(config file, folder to look for weights in)."""
    from qnext.hub import resolve_model

    if model is not None and model.endswith(".json") and Path(model).is_file():
        return Path(model), None
    folder = resolve_model(
        model,
        revision=revision,
        offline=offline,
        allow_patterns=["config.json", "model.safetensors.index.json"],
        progress=False,
    )
    return folder / "config.json", folder


def _layout(
    config: ModelConfig, folder: Path | None, quantization: dict[str, Any] | None
) -> tuple[Layout, str]:
    """What the weights are called, and how far they were checked against the config."""
    from qnext.checkpoint.census import detect_layout, read_layout
    from qnext.checkpoint.reader import INDEX, SINGLE, SafetensorsFolder

    if folder is None or not any((folder / name).exists() for name in (INDEX, SINGLE)):
        return detect_layout(config, (), quantization), "by the config; no weights here"
    try:
        files = SafetensorsFolder(folder)
    except CheckpointError:
        index = folder / INDEX
        if not index.exists() or any(folder.glob("*.safetensors")):
            raise
    else:
        layout = read_layout(files, config)
        return layout, "all there, shapes and dtypes as the config says"
    # Only the index was fetched: it names every tensor, which is all that a census of names needs.
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    layout = detect_layout(config, list(names), quantization)
    needed = {name for name, tensor in layout.tensors.items() if not tensor.optional}
    wrong = sorted(needed.symmetric_difference(names))
    wrong = [name for name in wrong if name not in layout.tensors or name in needed]
    if wrong:
        raise CheckpointError(
            f"{index.name} and config.json differ in {len(wrong)} tensors, such as {wrong[0]}",
            hint="they belong to different models",
        )
    return layout, "as the index names them"


def _facts(file: Path, folder: Path | None) -> dict[str, Any]:
    from qnext.checkpoint.census import active_parameter_count, parameter_count
    from qnext.config import ModelConfig
    from qnext.quant.config import find_quantization, read_quantization
    from qnext.weights import disk_tensors

    try:
        data = json.loads(file.read_text(encoding="utf-8")) if folder is None else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from error
    if folder is None and not isinstance(data, dict):
        raise ConfigError(f"{file} holds no JSON object", hint="give a config.json")
    config = ModelConfig.from_dict(data) if data else ModelConfig.from_pretrained(file.parent)
    quantization = find_quantization(data) if data else read_quantization(file.parent)
    layout, weights = _layout(config, folder, quantization)
    config = layout.config
    main, mtp = parameter_count(config)
    active = active_parameter_count(config)
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    kinds = Counter(config.layer_types)
    heads, dk, dv = (
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
    )
    channels = 2 * config.linear_num_key_heads * dk + heads * dv
    state = 4 * heads * dk * dv + 2 * channels * (config.linear_conv_kernel_dim - 1)
    kv = 4 * config.num_key_value_heads * config.head_dim
    experts = ""
    if config.num_experts:
        shared = " + 1 shared" if config.shared_expert_intermediate_size else ""
        experts = f"{config.num_experts_per_tok}{shared} of {config.num_experts}"
    total, used = short(main), short(active - tables)
    return {
        "model": str(folder or file),
        "model_type": config.model_type,
        "parameters": main,
        "active_parameters": active,
        "active_share": active / main,
        "body_parameters": main - tables,
        "active_body_parameters": active - tables,
        "active_body_share": (active - tables) / (main - tables),
        "size_name": f"{total}-A{used}" if config.num_experts else total,
        "size_name_share": _rounded(used) / _rounded(total),
        "mtp_parameters": mtp,
        "layers": dict(kinds),
        "experts": experts,
        "max_position_embeddings": config.max_position_embeddings,
        "kv_bytes_per_token": kinds["full_attention"] * kv,
        "state_bytes_per_sequence": kinds["linear_attention"] * state,
        "tensors": sum(not t.optional for t in layout.tensors.values()),
        "weights": weights,
        "quantization": layout.quantization.label if layout.quantization else None,
        "quantized_parameters": sum(
            prod(t.shape)
            for t in disk_tensors(config, fused_experts=True)
            if any(p.param in layout.packed for p in t.parts)
        ),
        "bytes": {name: _bytes(config, width) for name, width in PRECISIONS.items()},
    }


def _rounded(size: str) -> float:
    return float(size[:-1]) * {"B": 1e9, "M": 1e6, "K": 1e3}[size[-1]]


def _bytes(config: ModelConfig, width: float) -> int:
    """Bytes of all weights, MTP included, with ``width`` bytes per parameter of the matrices."""
    from qnext.weights import disk_tensors

    size = 0.0
    for tensor in disk_tensors(config, fused_experts=True):
        name = tensor.name.removesuffix(".weight")
        kept = name.endswith(("embed_tokens", "lm_head", "conv1d", "mlp.gate", "expert_gate"))
        if not tensor.optional:
            size += tensor.numel * (2 if kept or len(tensor.shape) < 2 else width)
    return int(size)
