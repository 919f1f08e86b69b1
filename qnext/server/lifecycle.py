"""The life of a server: listen, load, warm up, serve, drain, stop.

It listens before it loads, so that probes and early clients get an answer (503, come back) instead
of a closed port. Signals: the first one drains (no new requests, open ones are finished), a second
one stops.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from qnext.engine.async_llm import AsyncLLM
from qnext.engine.llm import LLM
from qnext.errors import ConfigError
from qnext.server.app import create_app
from qnext.server.service import Phase, Service

log = logging.getLogger(__name__)

Say = Callable[[str], None]

KEEP_ALIVE = 75
"""Seconds that an idle connection stays open; clients with pools reuse it."""


class Serving(uvicorn.Server):
    """uvicorn, with our meaning of signals."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Drain at the first signal, stop at the second."""
        del sig, frame
        if self.should_exit:
            self.force_exit = True
        elif self.service.phase != "failed":
            self.service.phase = "draining"
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        ConfigError: the address is taken or does not exist.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            hint="choose another --port; 0 takes any free one",
        ) from error


async def serve(service: Service, load: Callable[[], LLM], say: Say) -> None:
    """Run a server until a signal ends it.

    Args:
        service: its state.
        load: makes the model; called on a thread of its own.
        say: told of every phase.

    Raises:
        QnextError: the model cannot be loaded, or the address not be used.
    """
    options = service.options
    with listen(options.host, options.port) as sock:
        host, port = sock.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        say(f"listening on {url}")
        server = Serving(_config(service), service)
        start = asyncio.create_task(_start(service, server, load, say, url))
        await server.serve(sockets=[sock])
        forced = server.force_exit
        if start.done():
            start.result()
        else:
            start.cancel()
    loaded = service.loaded
    if loaded is not None:
        say("stopping" if forced else "drained")
        await loaded.engine.shutdown(drain=not forced)


def _config(service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(service),
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
    )


async def _start(
    service: Service, server: Serving, load: Callable[[], LLM], say: Say, url: str
) -> None:
    """Load and warm up beside the listening server; a failure ends it."""
    began = before = time.monotonic()

    def done(phase: str) -> None:
        nonlocal before
        now = time.monotonic()
        say(f"{phase} in {now - before:.1f} s")
        before = now

    def enter(phase: Phase) -> None:
        if service.phase != "draining":
            service.phase = phase

    try:
        enter("loading")
        engine = AsyncLLM(await _on_thread(load))
        loaded = service.attach(engine)
        done("loaded")
        enter("warming up")
        await warm_up(engine)
        done("warmed up")
        enter("ready")
        say(f"ready after {time.monotonic() - began:.1f} s: {loaded.name} at {url}/v1")
    except Exception:
        service.phase = "failed"
        server.should_exit = True
        raise


async def warm_up(engine: AsyncLLM) -> None:
    """Take the paths of real requests once: a prompt in one piece, drafts, sampling, greedy."""
    params = engine.llm.get_default_sampling_params()
    room = min(256, engine.llm.max_model_len - 8)
    prompt = [i % 64 for i in range(max(1, room))]
    for changes in ({"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9, "seed": 1}):
        await engine.generate(prompt, params.replace(max_tokens=4, ignore_eos=True, **changes))
    await engine.call(lambda llm: llm.engine.reset_stats())


async def _on_thread(load: Callable[[], LLM]) -> LLM:
    """``load()`` on a daemon thread: a server that is told to stop does not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[LLM] = loop.create_future()

    def finish(result: LLM | None, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        elif result is not None:
            future.set_result(result)

    def run() -> None:
        result, failure = None, None
        try:
            result = load()
        except Exception as error:
            failure = error
        try:
            loop.call_soon_threadsafe(finish, result, failure)
        except RuntimeError:
            log.debug("the server stopped before the model was loaded")

    threading.Thread(target=run, name="qnext-load", daemon=True).start()
    return await future
