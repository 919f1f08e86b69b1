"""The gate before every endpoint: who asks, how the server is called, how large the body is.

Plain ASGI, so that the endpoint still learns when its client leaves. The body is read here, within
limits, before any parser sees it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qnext.server.errors import GONE, Refusal, error_response
from qnext.server.options import ServerOptions

log = logging.getLogger(__name__)

OPEN_PATHS = ("/health", "/ready")
"""Answered without a key: probes of an orchestrator."""

Count = Callable[[str, int, float], None]
"""Told of every request: path, status, seconds."""


class Gate:
    """Middleware; sets ``scope["state"]["key"]``, a short digest that names the caller."""

    def __init__(self, app: ASGIApp, options: ServerOptions, count: Count) -> None:
        self.app, self.options, self.count = app, options, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection or request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        started, status, path = time.monotonic(), GONE, scope["path"]
        name = f"req_{uuid.uuid4().hex}"

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", name.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            scope.setdefault("state", {})["key"] = self._caller(headers, path)
            body = await self._body(headers, receive)
            if body is None:
                return
            await self.app(scope, _replay(body, receive), answer)
        except Refusal as refusal:
            response = error_response(refusal, path)
            response.headers["connection"] = "close"  # the rest of the body stays unread
            await response(scope, receive, answer)
        finally:
            seconds = time.monotonic() - started
            self.count(path, status, seconds)
            level = logging.DEBUG if path in OPEN_PATHS else logging.INFO
            log.log(level, "%s %s %s %d %.3f s", name, scope["method"], path, status, seconds)

    def _check_host(self, headers: Headers) -> None:
        """A page that has its own name resolve to this machine must not reach a local server."""
        hosts = self.options.hosts
        if hosts is None:
            return
        host = headers.get("host", "").strip()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name.lower() not in hosts:
            raise Refusal(
                "this server does not answer to that host name (option --allowed-host)", 403
            )

    def _caller(self, headers: Headers, path: str) -> str:
        digests = self.options.key_digests
        if not digests or path in OPEN_PATHS:
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            key = headers.get("x-api-key", "")
        given = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        fits = [hmac.compare_digest(given, digest) for digest in digests]  # all: equal time
        if not any(fits):
            raise Refusal("missing or wrong API key", 401, code="invalid_api_key")
        return given.hex()[:16]

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None if the client left."""
        most = self.options.max_body_bytes
        too_large = Refusal(f"the body is larger than {most} bytes", 413, code="request_too_large")
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.options.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal("the body took too long to arrive", 408) from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then whatever the server says: the client is gone, for one."""
    sent = False

    async def again() -> dict[str, Any] | Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
