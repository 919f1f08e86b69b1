"""``qnext doctor``: what this machine can run, and what is missing."""

from __future__ import annotations

import json
import os
import platform
import shutil
from typing import Annotated, Any

import typer

NEEDED = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "jinja2",
    "pydantic",
    "typer",
    "rich",
    "huggingface_hub",
)
OPTIONAL = {
    "triton": "gpu",
    "llguidance": "structured",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "matplotlib": "train",
    "lxml": "train",
    "datasets": "train",
    "pyarrow": "train",
    "tensorboard": "train",
    "lm_eval": "eval",
    "modelscope": "hub",
    "kagglehub": "hub",
    "transformers": "test",
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say what this machine can run, and what is missing."""
    facts = examine()
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        for name, value in facts["machine"].items():
            typer.echo(f"{name:14} {value}")
        for name, found in facts["packages"].items():
            typer.echo(f"{name:14} {found}")
        for line in facts["advice"]:
            typer.echo(f"-> {line}")
    if facts["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Facts about machine and packages, advice, and the number of real problems."""
    packages, advice, problems = {}, [], 0
    for name in NEEDED:
        packages[name] = _version(name) or "missing"
        if packages[name] == "missing":
            problems += 1
            advice.append(f"{name} is needed: pip install qnext")
    for name, extra in OPTIONAL.items():
        packages[name] = _version(name) or f"not installed (pip install 'qnext[{extra}]')"
    machine: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "disk free": f"{shutil.disk_usage('.').free / 1e9:.0f} GB",
    }
    memory = _memory()
    if memory:
        machine["memory"] = f"{memory / 1e9:.1f} GB"
    if packages["torch"] != "missing":
        machine["devices"] = _devices()
        if machine["devices"] == "cpu only":
            advice.append("no CUDA device: everything runs on the CPU references")
            if memory:
                advice.append(
                    f"a BF16 model of up to about {memory * 0.8 / 2e9:.0f}B parameters fits"
                )
        elif packages["triton"].startswith("not"):
            problems += 1
            advice.append("a CUDA device without Triton: pip install 'qnext[gpu]'")
    from qnext.errors import QnextError
    from qnext.hub import shipped_model

    try:
        machine["shipped model"] = str(shipped_model())
    except QnextError as error:
        problems += 1
        advice.append(str(error))
    return {"machine": machine, "packages": packages, "advice": advice, "problems": problems}


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _devices() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu only"
    names = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        names.append(f"{facts.name} {facts.total_memory / 1e9:.0f} GB")
    return ", ".join(names)
