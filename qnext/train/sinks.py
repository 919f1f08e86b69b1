"""TensorBoard and Weights & Biases, where they are installed and wanted."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from qnext.errors import ConfigError
from qnext.train.config import ReportConfig

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Something that keeps numbers by step."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Keep the numbers of one step."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in ``folder/tensorboard``."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, numbers: dict[str, float], step: int) -> None:
        """See :class:`Sink`."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See :class:`Sink`."""
        self.writer.close()


class WandB:
    """A run of Weights & Biases that is taken up again under the same name."""

    def __init__(self, folder: Path, project: str) -> None:
        import wandb

        name = "-".join(folder.resolve().parts[-2:])
        self.run: Any = wandb.init(project=project, dir=str(folder), id=name, resume="allow")

    def log(self, numbers: dict[str, float], step: int) -> None:
        """See :class:`Sink`."""
        self.run.log(numbers, step=step)

    def close(self) -> None:
        """See :class:`Sink`."""
        self.run.finish()


def open_sinks(folder: Path, config: ReportConfig) -> list[Sink]:
    """The sinks that the recipe wants.

    Raises:
        ConfigError: Weights & Biases is asked for and not installed.
    """
    sinks: list[Sink] = []
    if config.tensorboard and find_spec("tensorboard") is not None:
        sinks.append(TensorBoard(folder))
    if config.wandb_project is not None:
        if find_spec("wandb") is None:
            raise ConfigError(
                "report.wandb_project is set, but the package wandb is not installed",
                hint="pip install wandb, or remove the key",
            )
        sinks.append(WandB(folder, config.wandb_project))
    return sinks
