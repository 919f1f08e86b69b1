"""What a model argument means: a folder, or a name on one of the three hubs."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from qnext.errors import HubError

TITLES = {"hf": "Hugging Face", "modelscope": "ModelScope", "kaggle": "Kaggle"}

_WORD = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_-])?")
_LIKE_A_PATH = re.compile(r"^[/~.\\]|^[A-Za-z]:[/\\]|\\|/$|/\.{1,2}(/|$)|//")
_FILE_SUFFIXES = (".safetensors", ".json", ".gguf", ".bin", ".pt", ".pth")
_HOW = "give an existing folder, or org/name, hf:org/name, modelscope:org/name or kaggle:o/m/f/v"


@dataclass(frozen=True)
class ModelRef:
    """A model on a hub: ``hub`` is a key of TITLES, ``revision`` None means the newest."""

    hub: str
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        """The reference as a user writes it."""
        prefix = "" if self.hub == "hf" else f"{self.hub}:"
        return f"{prefix}{self.name}" + (f"@{self.revision}" if self.revision else "")

    @property
    def title(self) -> str:
        """Name of the hub for messages."""
        return TITLES[self.hub]


def parse_model(model: str | Path, revision: str | None = None) -> Path | ModelRef:
    """Read a model argument without touching the network.

    Args:
        model: a folder, ``org/name``, ``hf:``/``modelscope:org/name`` or
            ``kaggle:owner/model/framework/variation[/version]``; hub names may add ``@revision``.
        revision: branch, tag, commit or Kaggle version; must agree with ``@revision`` if given.

    Returns:
        The existing folder, or the hub reference.

    Raises:
        HubError: neither an existing folder nor a well-formed hub name.
    """
    text = os.fspath(model)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    if text and path.is_file():
        raise HubError(
            f"The model {text!r} is a file, and a model is a folder.",
            hint=f"use its folder: {path.parent}",
        )
    hub, colon, rest = text.partition(":")
    if not colon or hub not in TITLES:
        hub, rest = "hf", text
        if isinstance(model, Path) or _LIKE_A_PATH.search(text) or text.endswith(_FILE_SUFFIXES):
            raise HubError(f"There is no folder {text!r}.", hint=f"check the path; {_HOW}")
    name, at, pinned = rest.partition("@")
    if at and not pinned:
        raise HubError(
            f"The model {text!r} ends in '@' without a revision.", hint="name one, or drop the '@'"
        )
    if at and revision is not None and revision != pinned:
        raise HubError(
            f"The model {text!r} pins {pinned!r}, and the revision asked for is {revision!r}.",
            hint="give the revision once",
        )
    ref = ModelRef(hub, name, pinned or revision or None)
    return _kaggle(ref, text) if hub == "kaggle" else _plain(ref, text)


def _plain(ref: ModelRef, text: str) -> ModelRef:
    words = ref.name.split("/")
    if len(words) != 2 or not all(_WORD.fullmatch(word) for word in words):
        raise HubError(f"{text!r} is neither an existing folder nor a model name.", hint=_HOW)
    bad = ref.revision or ""
    if bad.startswith(("/", "-")) or ".." in bad or re.search(r"[\s\\~^:?*\[\x00-\x1f]", bad):
        raise HubError(f"{bad!r} is not a revision.", hint="give a branch, a tag or a commit hash")
    return ref


def _kaggle(ref: ModelRef, text: str) -> ModelRef:
    words = ref.name.split("/")
    if len(words) not in (4, 5) or not all(_WORD.fullmatch(word) for word in words):
        raise HubError(
            f"{text!r} is not a Kaggle model name.",
            hint="write kaggle:owner/model/framework/variation or add /version",
        )
    version = ref.revision
    if len(words) == 5:
        if version is not None and version != words[4]:
            raise HubError(
                f"{text!r} names version {words[4]}, and the revision asked for is {version!r}.",
                hint="give the version once",
            )
        version = words[4]
    if version is not None and (not version.isascii() or not version.isdigit() or int(version) < 1):
        raise HubError(
            f"{version!r} is not a Kaggle version.", hint="versions are whole numbers from 1"
        )
    return ModelRef("kaggle", "/".join(words[:4]), version)
