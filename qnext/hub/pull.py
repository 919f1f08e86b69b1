"""The one way from a model argument to a folder; `job.py` does the work for hub models."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from qnext.errors import HubError
from qnext.hub.failures import hub_errors
from qnext.hub.files import local_files
from qnext.hub.job import Hub, Job, PullResult, result_of
from qnext.hub.names import parse_model
from qnext.hub.progress import Progress

SHIPPED_FOLDER = Path(__file__).parents[1] / "assets" / "qnext-small"

_MODULES = {"hf": "huggingface", "modelscope": "modelscope", "kaggle": "kaggle"}


def shipped_model() -> Path:
    """The folder of the small model that comes with the package.

    Raises:
        HubError: this installation lacks it.
    """
    if not (SHIPPED_FOLDER / "config.json").is_file():
        raise HubError(
            f"The model that ships with qnext is not in this installation ({SHIPPED_FOLDER}).",
            hint="install qnext anew, or name a model folder or hub model",
        )
    return SHIPPED_FOLDER


def resolve_model(
    model: str | Path | None,
    *,
    revision: str | None = None,
    offline: bool = False,
    local_dir: str | Path | None = None,
    allow_patterns: Sequence[str] | None = None,
    progress: bool | Progress = True,
    mtp_only: bool = False,
) -> Path:
    """The folder of a model, fetched first if it is on a hub. Arguments and errors as in `pull`."""
    if model is not None:
        # A folder is used as it is: its files are not even counted.
        place = parse_model(model, revision)
        if isinstance(place, Path):
            return place
    return pull(
        model,
        revision=revision,
        offline=offline,
        local_dir=local_dir,
        allow_patterns=allow_patterns,
        progress=progress,
        mtp_only=mtp_only,
    ).path


def pull(
    model: str | Path | None,
    *,
    revision: str | None = None,
    offline: bool = False,
    local_dir: str | Path | None = None,
    allow_patterns: Sequence[str] | None = None,
    progress: bool | Progress = True,
    mtp_only: bool = False,
) -> PullResult:
    """Find or fetch a model: safetensors, JSON, text, templates, card and licence only.

    Args:
        model: an existing folder (used as it is), ``org/name`` or ``hf:org/name`` (Hugging Face),
            ``modelscope:org/name``, ``kaggle:owner/model/framework/variation[/version]``, each
            with an optional ``@revision``; None is the shipped model.
        revision: branch, tag, commit or Kaggle version to pin.
        offline: use only what is on this machine.
        local_dir: put the files here instead of the client's cache.
        allow_patterns: shell globs that narrow the files further.
        progress: True shows a bar on a terminal and a log line per ten seconds elsewhere.
        mtp_only: of the shards, only those that hold ``mtp.*``.

    Raises:
        HubError: not found, gated, not cached, damaged, disk full, unreachable, client missing.
    """
    place = shipped_model() if model is None else parse_model(model, revision)
    if isinstance(place, Path):
        return result_of(place, local_files(place, allow_patterns), None)
    hub = cast(Hub, importlib.import_module(f"qnext.hub.{_MODULES[place.hub]}"))
    target = None if local_dir is None else Path(local_dir).expanduser()
    job = Job(hub, place, target, allow_patterns, mtp_only)
    with hub_errors(place):
        return job.here() if offline else job.online(progress)
