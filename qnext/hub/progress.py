"""Progress of a pull: a bar on a terminal, one log line per ten seconds elsewhere.

Subclass `Progress` to show it elsewhere. `Meter` and `bar_class` feed it from the clients' bars.
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

logger = logging.getLogger(__name__)

_SECONDS_PER_LINE = 10.0
# Foreign modules are altered by one pull at a time.
_altering = threading.Lock()


class Progress:
    """Told what a pull does; this base shows nothing. Calls may come from several threads."""

    def start(self, title: str, files: int, total: int) -> None:
        """A pull of ``files`` files with ``total`` bytes begins (or grows: called again)."""

    def update(self, done: int) -> None:
        """``done`` bytes are here so far, files of earlier runs included."""

    def finish(self) -> None:
        """The pull ended, well or not."""


class TerminalProgress(Progress):
    """A bar on standard error with bytes, rate and time left."""

    def __init__(self) -> None:
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def start(self, title: str, files: int, total: int) -> None:
        """Draw the bar, or give it a new total."""
        from rich import progress as rich
        from rich.console import Console

        if self._bar is None:
            self._bar = rich.Progress(
                rich.TextColumn("{task.description}"),
                rich.BarColumn(),
                rich.DownloadColumn(),
                rich.TransferSpeedColumn(),
                rich.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(title)
        if self._task is not None:
            self._bar.update(self._task, description=f"{title} ({files} files)", total=total)

    def update(self, done: int) -> None:
        """Move the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)

    def finish(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()


class LogProgress(Progress):
    """One INFO line per ten seconds, for logs and pipes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._title, self._total, self._done = "", 0, 0
        self._next = float("-inf")

    def start(self, title: str, files: int, total: int) -> None:
        """Note what is pulled."""
        self._title, self._total = f"{title} ({files} files)", total
        if self._next == float("-inf"):
            self._next = self._clock() + _SECONDS_PER_LINE

    def update(self, done: int) -> None:
        """Write a line when ten seconds have gone by."""
        self._done = done
        if self._clock() >= self._next:
            self._next = self._clock() + _SECONDS_PER_LINE
            self._line()

    def finish(self) -> None:
        """Write the last line."""
        self._line()

    def _line(self) -> None:
        share = 100 * self._done // self._total if self._total else 100
        logger.info(
            "%s: %s of %s (%d %%)",
            self._title,
            size_text(self._done),
            size_text(self._total),
            share,
        )


def size_text(count: int) -> str:
    """``count`` bytes for a reader, in powers of 1000 as hubs show them."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def as_progress(progress: bool | Progress) -> Progress:
    """The object to report to: the given one, or a bar, log lines or silence."""
    if isinstance(progress, Progress):
        return progress
    if not progress:
        return Progress()
    return TerminalProgress() if sys.stderr.isatty() else LogProgress()


class Meter:
    """Sums what a client's bars report, clipped to ``total`` bytes, and passes it on."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self.done = progress, total, 0
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}
        self._overlapping = False

    @contextmanager
    def stage(self, have: int, *, overlapping: bool) -> Iterator[None]:
        """Reports in this block start at ``have`` bytes.

        ``overlapping``: the client shows the same bytes in several bars (network and disk), so the
        furthest one counts; otherwise each bar is a file of its own.
        """
        self._base, self._open, self._overlapping = have, {}, overlapping
        self.set(have)
        yield

    def set(self, done: int) -> None:
        """``done`` bytes in all."""
        self.done = min(done, self._total)
        self._progress.update(self.done)

    def report(self, bar: int, count: int) -> None:
        """Bar ``bar`` stands at ``count`` bytes."""
        with self._lock:
            self._open[bar] = count
            values = self._open.values()
            self.set(self._base + (max(values) if self._overlapping else sum(values)))


def bar_class(meter: Meter | None) -> type[Any]:
    """A tqdm class that draws nothing and reports byte bars to ``meter``."""
    from tqdm.std import tqdm

    class Bar(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._counts = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})
            self.update(0)

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self._counts and meter is not None:
                meter.report(id(self), int(self.n))

    return Bar


@contextmanager
def replaced(module: str, attribute: str, value: object) -> Iterator[None]:
    """Swap a name of a client that offers no hook for it; other pulls of this process wait."""
    with _altering:
        try:
            target = importlib.import_module(module)
            before = getattr(target, attribute)
        except (ImportError, AttributeError):
            # Another version of the client: it draws its own bars, nothing else changes.
            yield
            return
        setattr(target, attribute, value)
        try:
            yield
        finally:
            setattr(target, attribute, before)
