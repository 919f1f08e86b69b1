"""``qnext plan``: what a model takes on a device, byte by byte, and whether that fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli.training import describe_training
from qnext.errors import ConfigError

if TYPE_CHECKING:
    from qnext.config import ModelConfig
    from qnext.engine.plan import MemoryPlan, WeightFormat

LABELS = {
    "embedding": "embedding",
    "head": "head",
    "norms": "norms",
    "delta_net": "DeltaNet layers",
    "attention": "attention layers",
    "router": "routers",
    "shared_expert": "shared experts",
    "experts": "routed experts",
    "mlp": "dense MLPs",
    "mtp": "MTP module",
    "scales": "scales of all parts",
    "zero_points": "zero points of all parts",
    "compiled_copies": "copies for the compiled loops",
    "kv_cache": "keys and values",
    "running_states": "states of running sequences",
    "snapshots": "state snapshots",
    "activations": "activations of a step",
    "attention_workspace": "attention of a step",
    "verify": "rows under verification",
    "logits": "logits and sampling",
    "cuda_graphs": "CUDA graphs (estimate)",
    "context": "context of the process (estimate)",
    "slack": "slack of the allocator (estimate)",
}


def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="80b, qwen3-32b, 235b, a folder, a config.json or a hub id."),
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", "--max-model-len", help="Tokens of a sequence.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "--max-num-seqs", help="Such sequences at once.")
    ] = 1,
    gpu: Annotated[str | None, typer.Option(help="h100, h200, b200, ...; cpu: here.")] = None,
    memory: Annotated[str | None, typer.Option(help="Instead of --gpu: 48GiB, say.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto, float32, bfloat16, float16, fp8, int4.")
    ] = "auto",
    expert_dtype: Annotated[str | None, typer.Option(help="Of the routed experts.")] = None,
    group_size: Annotated[int, typer.Option(help="Inputs that share an int4 scale.")] = 32,
    zero_points: Annotated[bool, typer.Option(help="int4 groups have zero points.")] = False,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, fp8, bfloat16, ...")] = "auto",
    state_dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    num_speculative_tokens: Annotated[int, typer.Option(help="MTP drafts per step.")] = 0,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Rows of a step.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens of a KV block.")] = 16,
    snapshots: Annotated[
        int | None, typer.Option(help="Extra states; default: shares out the rest.")
    ] = None,
    enable_prefix_caching: Annotated[bool, typer.Option(help="Remember requests.")] = True,
    enforce_eager: Annotated[bool, typer.Option(help="No CUDA graphs.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    offline: Annotated[bool, typer.Option(help="Use only what is downloaded.")] = False,
    train: Annotated[
        Path | None, typer.Option(help="A training recipe: what it takes on every rank instead.")
    ] = None,
    ranks: Annotated[int, typer.Option(help="Devices of --train.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say what a model takes on a device and whether that fits, from its config alone.

    Exit code 1: it does not fit; the nearest settings that do are listed.
    """
    if train is not None:
        typer.echo(describe_training(train, ranks, as_json))
        return
    from qnext.engine.plan import GPUS, gpu_memory, parse_memory, plan_memory

    if gpu is not None and memory is not None:
        raise ConfigError("--gpu and --memory both name a size", hint="give one of them")
    cpu = gpu == "cpu"
    size = parse_memory(memory) if memory else None if cpu else gpu_memory(gpu or "h200")
    name, config, stored = _read(model, revision, offline)
    if num_speculative_tokens and not config.num_mtp_layers and stored is None:
        # A bare config of Qwen3-Next does not mention the MTP module that the files hold.
        config = _with_mtp(config)
    form = _format(stored, dtype, expert_dtype, group_size, zero_points, cpu)
    options: dict[str, Any] = {
        "weights": form, "device": "cpu" if cpu else "cuda", "max_model_len": context,
        "max_num_seqs": concurrency, "full_seqs": concurrency,
        "max_num_batched_tokens": max_num_batched_tokens, "block_size": block_size,
        "kv_cache_dtype": kv_cache_dtype, "state_dtype": state_dtype,
        "num_speculative_tokens": num_speculative_tokens,
        "enable_prefix_caching": enable_prefix_caching, "snapshots": snapshots,
        "enforce_eager": enforce_eager, "compiled_copies": cpu and form.dtype == "float32",
    }  # fmt: skip
    made = plan_memory(config, memory_bytes=size, **options)
    others = []
    if not made.fits and not cpu:
        fixed = options | {"max_model_len": made.max_model_len}
        others = [g for g, b in GPUS.items() if plan_memory(config, memory_bytes=b, **fixed).fits]
    facts = _facts(name, gpu or ("" if memory else "h200"), made, others)
    typer.echo(json.dumps(facts) if as_json else "\n".join(_lines(facts, made)))
    if not made.fits:
        raise typer.Exit(1)


def _format(
    stored: WeightFormat | None,
    dtype: str,
    expert_dtype: str | None,
    group_size: int,
    zero_points: bool,
    cpu: bool,
) -> WeightFormat:
    """What ``--dtype`` means; "auto": as the files are, and fp32 for 16-bit files on a CPU."""
    from qnext.engine.plan import WeightFormat

    if dtype != "auto":
        return WeightFormat(dtype, expert_dtype, group_size, zero_points)
    form = stored or WeightFormat()
    if cpu and form.dtype in ("bfloat16", "float16"):
        form = WeightFormat("float32")
    return replace(form, expert_dtype=expert_dtype) if expert_dtype else form


def _read(
    model: str | None, revision: str | None, offline: bool
) -> tuple[str, ModelConfig, WeightFormat | None]:
    """(name, config, how its files store the weights, None where there are no files)."""
    from qnext.checkpoint.census import detect_layout
    from qnext.checkpoint.reader import INDEX, SINGLE, SafetensorsFolder
    from qnext.config import ModelConfig
    from qnext.engine.plan import PRESETS, preset
    from qnext.hub import resolve_model

    if model is not None and model.lower() in PRESETS and not Path(model).exists():
        return PRESETS[model.lower()], preset(model), None
    if model is not None and model.endswith(".json") and Path(model).is_file():
        return model, ModelConfig.from_dict(_json(Path(model))), None
    wanted = ["config.json", INDEX]
    folder = resolve_model(
        model, revision=revision, offline=offline, allow_patterns=wanted, progress=False
    )
    raw = _json(folder / "config.json")
    config = ModelConfig.from_dict(raw)
    if (folder / INDEX).is_file():
        config = detect_layout(config, _json(folder / INDEX).get("weight_map", {})).config
    elif (folder / SINGLE).is_file():
        config = detect_layout(config, SafetensorsFolder(folder).entries).config
    return model or folder.name, config, _stored(raw)


def _stored(raw: dict[str, Any]) -> WeightFormat:
    """The format that a published config names."""
    from qnext.engine.plan import WeightFormat

    found = raw.get("quantization_config")
    if isinstance(found, dict):
        method, groups = str(found.get("quant_method")), found.get("group_size")
        for group in (found.get("config_groups") or {}).values():
            groups = groups or (group.get("weights") or {}).get("group_size")
        if method == "fp8":
            return WeightFormat("fp8")
        if method in ("gptq", "awq", "compressed-tensors"):
            return WeightFormat("int4", group_size=groups or 128, zero_points=method == "awq")
        raise ConfigError(
            f"quant_method {method!r} is not known", hint="name the format with --dtype"
        )
    text = raw.get("text_config") if isinstance(raw.get("text_config"), dict) else raw
    dtype = (text or raw).get("dtype") or (text or raw).get("torch_dtype") or "bfloat16"
    return WeightFormat(str(dtype))


def _with_mtp(config: ModelConfig) -> ModelConfig:
    if config.model_type != "qwen3_next":
        return config
    return config.model_copy(update={"num_mtp_layers": 1})


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} holds no JSON object", hint="give a config.json")
    return data


def _facts(name: str, gpu: str, made: MemoryPlan, others: list[str]) -> dict[str, Any]:
    asked = made.request
    return {
        "model": name,
        "device": gpu or asked.device,
        "weights": asked.weights.name,
        "max_model_len": asked.max_model_len,
        "concurrency": asked.full_seqs,
        "max_num_batched_tokens": asked.max_num_batched_tokens,
        "num_speculative_tokens": asked.num_speculative_tokens,
        "kv_cache_dtype": asked.kv_dtype,
        "state_dtype": asked.state_dtype,
        "memory_bytes": asked.memory_bytes,
        "required_bytes": asked.required_bytes,
        "fits": made.fits,
        "bytes": dict(made.parts),
        "total_bytes": made.total_bytes,
        "weight_bytes": made.weight_bytes,
        "block_size": asked.block_size,
        "block_bytes": asked.block_bytes,
        "num_blocks": made.num_blocks,
        "slot_bytes": asked.slot_bytes,
        "num_slots": made.num_slots,
        "num_snapshots": made.num_snapshots,
        "suggestions": [s.text for s in made.suggestions],
        "gpus_that_fit": others,
    }


def _lines(facts: dict[str, Any], made: MemoryPlan) -> list[str]:
    from qnext.engine.defaults import longest_context

    asked = made.request
    lines = [
        f"{facts['model']}: {facts['weights']} weights, {facts['concurrency']} x "
        f"{facts['max_model_len']:,} tokens on {facts['device']} "
        f"({facts['memory_bytes'] / 2**30:,.2f} GiB)",
        "",
        f"{'part':34} {'bytes':>19} {'GiB':>9}",
    ]
    for part, size in made.parts.items():
        if size:
            lines.append(f"{LABELS[part]:34} {size:19,} {size / 2**30:9.3f}")
    total, memory = made.total_bytes, asked.memory_bytes
    lines.append(f"{'in all':34} {total:19,} {total / 2**30:9.3f}")
    lines.append("")
    if asked.block_bytes:
        lines.append(
            f"{made.num_blocks:,} KV blocks of {asked.block_size} tokens, "
            f"{asked.block_bytes:,} bytes each: {made.num_blocks * asked.block_size:,} tokens"
        )
    lines.append(
        f"{made.num_slots:,} state slots of {asked.slot_bytes:,} bytes: {asked.max_num_seqs} "
        f"running, {made.num_snapshots:,} snapshots"
    )
    longest = longest_context(asked.config)
    if asked.max_model_len > longest:
        lines.append(f"beyond the model's own {longest:,} tokens: needs a rope_scaling (YaRN)")
    if made.fits:
        more = total - asked.required_bytes
        lines.append(
            f"fits: {asked.required_bytes:,} of {memory:,} bytes are needed, {more:,} more are used"
            f" {'to remember requests' if asked.enable_prefix_caching else 'for more contexts'}"
        )
        return lines
    lines.append(f"does not fit: {total - memory:,} bytes more than the {memory:,} there are")
    lines += [f"  fits: {suggestion.text}" for suggestion in made.suggestions]
    if facts["gpus_that_fit"]:
        lines.append(f"  fits as asked on: {', '.join(facts['gpus_that_fit'])}")
    if not made.suggestions and not facts["gpus_that_fit"]:
        lines.append("  no setting makes it fit; it needs a device with more memory")
    return lines
