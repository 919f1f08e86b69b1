"""Shared by every test: helper modules, one thread, the same hypothesis examples on every run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Helper modules lie beside the tests that use them (tiny.py, parity/hf_models.py, ...).
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(room) for room in sorted(HERE.iterdir()) if room.is_dir())]

torch.set_num_threads(1)
settings.register_profile("qnext", deadline=None, derandomize=True, database=None)
settings.load_profile("qnext")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return HERE.parent
