"""Models by name: `pull` and `resolve_model` find or fetch a model folder on three hubs.

The official clients do the work (`huggingface.py`, `modelscope.py`, `kaggle.py`; imported on use);
`job.py` chooses the files, checks them and reports.
"""

from __future__ import annotations

from qnext.hub.job import PullResult
from qnext.hub.progress import LogProgress, Progress, TerminalProgress
from qnext.hub.pull import pull, resolve_model, shipped_model

__all__ = [
    "LogProgress",
    "Progress",
    "PullResult",
    "TerminalProgress",
    "pull",
    "resolve_model",
    "shipped_model",
]
