"""The command line in this process, as ``main`` runs it, and small models to point it at."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from qnext.checkpoint import save_model
from qnext.cli import main


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def qnext(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Done]]:
    """Run ``qnext ARGUMENTS`` without a new process."""
    names = ("qnext", "qnext.hub", "qnext.train")
    levels = {name: logging.getLogger(name).level for name in names}

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["qnext", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Done(int(ended.value.code or 0), out, err)

    yield run
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A tiny random model on disk, one file, one matrix per expert."""
    return save_model(tiny_model(torch.bfloat16), tmp_path / "tiny")
