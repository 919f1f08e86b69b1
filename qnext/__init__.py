"""qnext: Qwen3-Next, the whole system, in Python.

Importing the package imports nothing heavy; the public names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qnext.checkpoint import load_model
    from qnext.config import ModelConfig
    from qnext.engine.llm import LLM
    from qnext.engine.sampling_params import SamplingParams
    from qnext.engine.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "ModelConfig",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
    "load_model",
]

_HOMES = {
    "LLM": "qnext.engine.llm",
    "ModelConfig": "qnext.config",
    "SamplingParams": "qnext.engine.sampling_params",
    "StructuredOutputsParams": "qnext.engine.structured_outputs",
    "load_model": "qnext.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qnext' has no attribute {name!r}")
