"""From engine steps to server-sent events, and from a client that leaves to an abort."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qnext.engine.async_llm import Stream
from qnext.engine.outputs import StreamDelta
from qnext.server.errors import GONE, Refusal, error_body, refusal_of, to_json

T = TypeVar("T")


async def steps(
    streams: Sequence[Stream], seconds: float
) -> AsyncGenerator[tuple[int, list[StreamDelta]], None]:
    """What each of several requests gains, with its place, until all have ended.

    Raises:
        Refusal: a sequence failed.
        TimeoutError: it took longer than ``seconds``.
    """
    end = time.monotonic() + seconds
    waiting = {asyncio.ensure_future(s.take()): i for i, s in enumerate(streams)}
    try:
        while waiting:
            left = max(0.0, end - time.monotonic())
            done, _ = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise TimeoutError
            for task in done:
                place = waiting.pop(task)
                deltas = task.result()
                for delta in deltas:
                    if delta.finish_reason == "error":
                        raise Refusal(
                            f"generation failed: {delta.error}", 500, code="generation_error"
                        )
                if streams[place].num_open:
                    waiting[asyncio.ensure_future(streams[place].take())] = place
                yield place, deltas
    finally:
        for task in waiting:
            task.cancel()


async def unless_gone(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """``answer``, cancelled as soon as the client leaves.

    Raises:
        Refusal: it left.
    """
    work, watch = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refusal("the client left", GONE)
        return work.result()
    finally:
        await _cancel(work, watch)


class EventStream(Response):
    """Server-sent events: one per item, errors as an event, ``[DONE]`` at the end.

    Args:
        events: items to send as JSON; it is closed when the client leaves.
        done: the last line, None for none.
        named: send each item's ``type`` as the event's name.
        path: of the request, for the form of errors.
    """

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any], None],
        *,
        done: bytes | None = b"data: [DONE]\n\n",
        named: bool = False,
        path: str = "",
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(None, 200, headers, "text/event-stream")
        del self.headers["content-length"]
        self.events, self.done, self.named, self.path = events, done, named, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client leaves."""
        work = asyncio.ensure_future(self._send(send))
        watch = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            await _cancel(work, watch)
            await self.events.aclose()

    async def _send(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        last = self.done
        try:
            async for event in self.events:
                await send(_body(self._event(event)))
        except Exception as error:
            # A client that left while something was sent shows as OSError, and reads nothing.
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                return
            last = self._event(error_body(refusal_of(error), self.path))
        if last is not None:
            await send(_body(last))
        await send(_body(b"", more=False))

    def _event(self, item: dict[str, Any]) -> bytes:
        name = f"event: {item.get('type', 'error')}\n".encode() if self.named else b""
        return name + b"data: " + to_json(item) + b"\n\n"


async def started(events: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same events; the first is awaited here, so that a refusal is not yet an event."""
    try:
        first = await anext(events)
    except BaseException:
        await events.aclose()
        raise
    return _chained(first, events)


async def _chained(first: T, events: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    try:
        yield first
        async for event in events:
            yield event
    finally:
        await events.aclose()


def _body(data: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task
