"""Published configs of well-known models, so that they can be planned without a download."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from qnext.config import ModelConfig
from qnext.errors import ConfigError

_FOLDER = Path(__file__).parents[2] / "assets" / "presets"
PRESETS = {
    "80b": "Qwen3-Next-80B-A3B",
    "qwen3-32b": "Qwen3-32B",
    "235b": "Qwen3-235B-A22B",
}
"""Names of the presets, and of the models that they describe."""


def preset(name: str) -> ModelConfig:
    """The config of a known model; Qwen3-Next with the MTP module that its files hold.

    Raises:
        ConfigError: no such name.
    """
    key = name.lower()
    if key not in PRESETS:
        near = difflib.get_close_matches(key, PRESETS, 1)
        raise ConfigError(
            f"no model is known as {name!r}",
            hint=(f"did you mean {near[0]}? " if near else "") + f"known: {', '.join(PRESETS)}",
        )
    return ModelConfig.from_dict(json.loads((_FOLDER / f"{key}.json").read_text(encoding="utf-8")))
