"""The engine behind HTTP: OpenAI's API for the clients that people already have.

    gate.py      who may come in: keys, hosts, sizes
    schema.py    what a body may say; refused.py what it may not, and why
    service.py   one loaded model and what requests share; admission.py how many at once
    completions.py, chat.py, responses.py, anthropic.py, tokens.py   the endpoints
    errors.py    every failure as a status and an OpenAI error body
    lifecycle.py start, drain, stop

Read app.py first.
"""

from __future__ import annotations

from qnext.server.app import create_app
from qnext.server.options import ServerOptions
from qnext.server.service import Service

__all__ = ["ServerOptions", "Service", "create_app"]
