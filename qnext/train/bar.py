"""The bar of a run on a terminal: step, loss, rate, utilisation, memory, time left."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Bar:
    """One line that is drawn again with every reading.

    Args:
        steps: of the run.
        start: those already done.
        console: where to draw; default: stderr.
    """

    def __init__(self, steps: int, start: int, console: Console | None = None) -> None:
        self.inner = Progress(
            MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}"),
            console=console or Console(stderr=True),
        )  # fmt: skip
        self.task = self.inner.add_task("", total=steps, completed=start)
        self.inner.start()

    @classmethod
    def on_terminal(cls, steps: int, start: int) -> Bar | None:
        """A bar if somebody watches, else None."""
        return cls(steps, start) if sys.stderr.isatty() else None

    def update(self, row: dict[str, Any]) -> None:
        """Show the numbers of a row of metrics."""
        self.inner.update(self.task, completed=row["step"], description=describe(row))

    def close(self) -> None:
        """Leave the last state on the screen."""
        self.inner.stop()


def describe(row: dict[str, Any]) -> str:
    """The numbers people watch, in a fixed order; those that are not known are left out."""
    parts = [f"loss {row['loss']:.4f}"]
    if row.get("mtp_loss"):
        parts.append(f"mtp {row['mtp_loss']:.3f}")
    parts.append(f"grad {row['grad_norm']:.2f}")
    parts.append(f"{row['tokens_per_s']:,.0f} tok/s")
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.1%}")
    parts.append(f"{row['memory_gib']:.1f} GiB")
    if row.get("skipped"):
        parts.append(f"skipped {row['skipped']:.0f}")
    parts.append(f"left {clock(row['eta_s'])}")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
