"""The one exception tree: everything qnext raises on purpose.

    QnextError
    ├─ ConfigError         a value the user can change is wrong (config.json, recipe, option)
    ├─ CheckpointError     a folder of weights cannot be used as it is
    │  ├─ MissingTensor    names the model needs and the files lack
    │  ├─ UnexpectedTensor names in the files that the model does not know
    │  ├─ ShapeMismatch    a tensor of another shape or dtype than the config says
    │  └─ DamagedFile      truncated, overlapping, not safetensors
    ├─ HubError            a model id that cannot be resolved or downloaded
    ├─ TextError           tokenizer or chat template cannot do what was asked
    ├─ RequestError        a generation request that can never be served
    ├─ EngineError         the engine itself failed
    ├─ KernelError         a shape, dtype or device that an op does not cover
    └─ TrainingError       a run that cannot go on (data, resume, non-finite loss)

Every message says what was asked, what was found and, in ``hint``, what to do.
"""

from __future__ import annotations


class QnextError(Exception):
    """Base of all errors raised on purpose; ``hint`` says what the user can do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(QnextError):
    """A value the user can change is wrong."""


class CheckpointError(QnextError):
    """A folder of weights cannot be used as it is."""


class MissingTensor(CheckpointError):
    """Tensors that the model needs are not in the files."""


class UnexpectedTensor(CheckpointError):
    """Tensors in the files are not known to the model."""


class ShapeMismatch(CheckpointError):
    """A tensor has another shape or dtype than the config says."""


class DamagedFile(CheckpointError):
    """A file is truncated, overlapping or not safetensors at all."""


class HubError(QnextError):
    """A model id cannot be resolved or downloaded."""


class TextError(QnextError):
    """The tokenizer or the chat template cannot do what was asked."""


class RequestError(QnextError):
    """A generation request can never be served as asked."""


class EngineError(QnextError):
    """The engine itself failed."""


class KernelError(QnextError):
    """An op does not cover this shape, dtype or device."""


class TrainingError(QnextError):
    """A training run cannot go on."""
