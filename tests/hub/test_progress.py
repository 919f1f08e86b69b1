"""Progress: a bar on a terminal, a line per ten seconds elsewhere, and the tqdm adapters."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from qnext.hub.progress import (
    LogProgress,
    Meter,
    Progress,
    TerminalProgress,
    as_progress,
    bar_class,
    replaced,
    size_text,
)


class Recorder(Progress):
    def __init__(self):
        self.seen = []

    def update(self, done):
        self.seen.append(done)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_choice(monkeypatch):
    own = Recorder()
    assert as_progress(own) is own
    assert type(as_progress(False)) is Progress
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(as_progress(True), LogProgress)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(as_progress(True), TerminalProgress)


def test_one_line_per_ten_seconds(caplog):
    caplog.set_level(logging.INFO)
    now = 100.0
    progress = LogProgress(clock=lambda: now)
    progress.start("org/name", 3, 2000)
    for now in (101.0, 105.0, 109.9, 110.0, 111.0, 119.0, 121.0):
        progress.update(int(10 * (now - 100)))
    assert [r.getMessage() for r in caplog.records] == [
        "org/name (3 files): 100 B of 2.0 kB (5 %)",
        "org/name (3 files): 210 B of 2.0 kB (10 %)",
    ]
    progress.update(2000)
    progress.finish()
    assert caplog.records[-1].getMessage() == "org/name (3 files): 2.0 kB of 2.0 kB (100 %)"
    assert len(caplog.records) == 3


def test_terminal_bar(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    progress = TerminalProgress()
    progress.start("org/name", 3, 4_000_000)
    progress.start("org/name", 2, 2_000_000)
    progress.update(2_000_000)
    progress.finish()
    assert "org/name (2 files)" in screen.getvalue()
    assert "2.0/2.0 MB" in screen.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (162_700_000_000, "162.7 GB"),
        (2e15, "2000.0 TB"),
    ],
)
def test_size_text(count, text):
    assert size_text(int(count)) == text


@pytest.mark.parametrize(("overlapping", "last"), [(True, 40), (False, 70)])
def test_bars_add_up_or_overlap(overlapping, last):
    seen = Recorder()
    meter = Meter(seen, 100)
    make = bar_class(meter)
    with meter.stage(10, overlapping=overlapping):
        first, second = make(total=50, unit="B"), make(total=50, unit="B", initial=5, name="x")
        files = make(total=2)
        first.update(30)
        second.update(25)
        files.update(2)
        assert (first.n, second.n, files.n) == (30, 30, 2)
    assert seen.seen[0] == 10
    assert seen.seen[-1] == last


def test_never_more_than_the_total():
    seen = Recorder()
    meter = Meter(seen, 20)
    with meter.stage(10, overlapping=False):
        bar_class(meter)(unit="B").update(500)
    assert seen.seen[-1] == 20


def test_bars_draw_nothing(capfd):
    bar = bar_class(None)(total=3, desc="noise")
    bar.update(3)
    bar.set_description("noise")
    bar.refresh()
    bar.close()
    assert list(bar_class(None)(range(3))) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_replaced_puts_back_and_bears_other_versions():
    import json

    real = json.dumps
    with replaced("json", "dumps", None):
        assert json.dumps is None
    assert json.dumps is real
    with pytest.raises(RuntimeError), replaced("json", "dumps", None):
        raise RuntimeError
    assert json.dumps is real
    with replaced("no_such_module_here", "x", None), pytest.raises(ImportError):
        import no_such_module_here  # noqa: F401
    with replaced("json", "no_such_name", None):
        assert not hasattr(json, "no_such_name")
