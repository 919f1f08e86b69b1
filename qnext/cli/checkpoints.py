"""``qnext inspect``, ``pull`` and ``convert``: checkpoint folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from qnext.errors import CheckpointError, ConfigError

PRECISIONS = {"bfloat16": 2.0, "float8 (128x128 scales)": 1 + 4 / 128**2, "int4 (group 32)": 0.5625}


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
    facts = _facts(_folder(model, revision, offline))
    if as_json:
        typer.echo(json.dumps(facts))
        return
    active = f"{facts['active_parameters']:,}, {facts['active_share']:.1%} per token"
    rows = {
        "model": facts["model"],
        "type": facts["model_type"],
        "parameters": f"{facts['parameters']:,}",
        "active": active,
        "MTP parameters": f"{facts['mtp_parameters']:,}",
        "layers": ", ".join(f"{n} {kind}" for kind, n in facts["layers"].items()),
        "experts": facts["experts"] or "none",
        "context": f"{facts['max_position_embeddings']:,} tokens",
        "KV per token": f"{facts['kv_bytes_per_token']:,} bytes (bfloat16)",
        "state per sequence": f"{facts['state_bytes_per_sequence']:,} bytes",
        "tensors": f"{facts['tensors']:,} ({facts['weights']})",
    }
    for name, size in facts["bytes"].items():
        rows[f"weights in {name}"] = f"{size / 1e9:,.2f} GB"
    for name, value in rows.items():
        typer.echo(f"{name:34} {value}")


def pull(
    model: Annotated[str, typer.Argument(help="org/name, modelscope:org/name or kaggle:...")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit to pin.")] = None,
    local_dir: Annotated[Path | None, typer.Option(help="Put the files here.")] = None,
    mtp_only: Annotated[bool, typer.Option(help="Only the shards that hold mtp.*.")] = False,
    offline: Annotated[bool, typer.Option(help="Only say what is downloaded.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Download a model: safetensors, config, tokenizer, licence; never code or pickle."""
    from qnext.hub import pull as fetch

    done = fetch(
        model, revision=revision, local_dir=local_dir, mtp_only=mtp_only, offline=offline,
        progress=True,
    )  # fmt: skip
    if as_json:
        row = {"path": str(done.path), "files": list(done.files), "bytes": done.bytes,
               "revision": done.revision}  # fmt: skip
        typer.echo(json.dumps(row))
    else:
        typer.echo(str(done.path))


def convert(
    source: Annotated[str, typer.Argument(help="Folder or hub id.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    dtype: Annotated[str, typer.Option(help="auto keeps it; bfloat16, float16, float32.")] = "auto",
    fused_experts: Annotated[
        bool | None, typer.Option(help="Stacked experts or one matrix per expert.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Such as 500MB or 5GB.")] = "5GB",
    force: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
) -> None:
    """Rewrite a checkpoint in another dtype, expert storage or sharding."""
    from qnext.checkpoint import load_model, save_model
    from qnext.checkpoint.load import parse_dtype
    from qnext.hub import resolve_model

    size = parse_size(max_shard_size)
    folder = resolve_model(source)
    if target.exists() and target.resolve() == folder.resolve():
        raise ConfigError(f"source and target are both {target}", hint="write to another folder")
    if target.exists() and any(target.iterdir()) and not force:
        raise ConfigError(f"{target} is not empty", hint="choose another folder, or pass --force")
    wanted = parse_dtype(dtype)
    model = load_model(folder, dtype="auto", device="cpu")
    save_model(
        model, target, dtype=wanted, max_shard_size=size, fused_experts=fused_experts,
        extra_files=folder,
    )  # fmt: skip
    typer.echo(str(target))


def parse_size(text: str) -> int:
    """Bytes of ``500MB`` or ``5GB`` (decimal units).

    Raises:
        ConfigError: not such a text.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"size {text!r} is not of the form 500MB or 5GB") from error
    if size < 1:
        raise ConfigError(f"size {text!r} must be positive")
    return size


def _folder(model: str | None, revision: str | None, offline: bool) -> Path:
    from qnext.hub import resolve_model

    if model is not None and model.endswith(".json") and Path(model).is_file():
        return Path(model).parent
    return resolve_model(
        model,
        revision=revision,
        offline=offline,
        allow_patterns=["config.json", "model.safetensors.index.json"],
        progress=False,
    )


def _facts(folder: Path) -> dict[str, Any]:
    from qnext.checkpoint.census import (
        active_parameter_count,
        check_census,
        detect_layout,
        parameter_count,
    )
    from qnext.checkpoint.reader import INDEX, SafetensorsFolder
    from qnext.config import ModelConfig

    config = ModelConfig.from_pretrained(folder)
    weights = "no weights here"
    names: list[str] = []
    try:
        files = SafetensorsFolder(folder)
    except CheckpointError:
        index = folder / INDEX
        if index.exists():
            # Only the index was fetched: it names every tensor, which is all a census needs.
            names = list(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}))
            weights = "named by the index"
        layout = detect_layout(config, names)
        if names and set(names) != {n for n, t in layout.tensors.items() if not t.optional}:
            raise CheckpointError(f"{index} and the config of {folder} do not match") from None
    else:
        layout = detect_layout(config, files.entries)
        check_census(layout, files)
        weights = "all checked"
    config = layout.config
    main, mtp = parameter_count(config)
    active = active_parameter_count(config)
    kinds: dict[str, int] = {}
    for kind in config.layer_types:
        kinds[kind] = kinds.get(kind, 0) + 1
    heads, dk, dv = (
        config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim,
    )  # fmt: skip
    channels = 2 * config.linear_num_key_heads * dk + heads * dv
    state = 4 * heads * dk * dv + 2 * channels * (config.linear_conv_kernel_dim - 1)
    experts = ""
    if config.num_experts:
        shared = " + 1 shared" if config.shared_expert_intermediate_size else ""
        experts = f"{config.num_experts_per_tok}{shared} of {config.num_experts}"
    return {
        "model": str(folder),
        "model_type": config.model_type,
        "parameters": main,
        "mtp_parameters": mtp,
        "active_parameters": active,
        "active_share": active / main,
        "layers": kinds,
        "experts": experts,
        "max_position_embeddings": config.max_position_embeddings,
        "kv_bytes_per_token": kinds.get("full_attention", 0)
        * 4 * config.num_key_value_heads * config.head_dim,
        "state_bytes_per_sequence": kinds.get("linear_attention", 0) * state,
        "tensors": sum(not t.optional for t in layout.tensors.values()),
        "weights": weights,
        "bytes": {name: int((main + mtp) * width) for name, width in PRECISIONS.items()},
    }  # fmt: skip
