"""Checkpoint folders in and out: census, streaming load, save, random initial weights.

Read ``reader`` (what lies where), ``census`` (is it what the config asks for), ``load``, ``save``.
"""

from __future__ import annotations

from qnext.checkpoint.init import build_model
from qnext.checkpoint.load import load_model
from qnext.checkpoint.save import save_model

__all__ = ["build_model", "load_model", "save_model"]
