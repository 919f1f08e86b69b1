"""AsyncLLM: the engine on a thread of its own, awaited from asyncio.

The thread alone touches the engine. Callers send it commands (add, abort) and receive deltas
through their own event loop; between steps it takes all commands that have come, so an abort takes
effect within one step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from qnext.engine.llm import LLM
from qnext.engine.outputs import RequestOutput, StreamDelta
from qnext.engine.prompts import Prompt, parse_prompt
from qnext.engine.request import Request, news
from qnext.engine.sampling_params import SamplingParams
from qnext.errors import EngineError

log = logging.getLogger(__name__)

_FAILURES = 3
"""Steps in a row that may fail before the engine gives up."""


@dataclass(eq=False)
class Stream:
    """One request's way back to its caller.

    Attributes:
        request: what was asked; its ``metrics`` are whole once ``num_open`` is 0.
        num_open: sequences whose end the caller has not seen.
    """

    request: Request
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[list[StreamDelta] | Exception]
    sent: list[tuple[int, int]] = field(default_factory=list)
    num_open: int = 0

    async def take(self) -> list[StreamDelta]:
        """What is new; call it while ``num_open`` is not 0.

        Raises:
            EngineError: the engine has stopped or fails.
        """
        item = await self.queue.get()
        if isinstance(item, Exception):
            raise item
        self.num_open -= sum(delta.finish_reason is not None for delta in item)
        return item

    def push(self) -> None:
        """Send what is new."""
        deltas = []
        for sequence in self.request.sequences:
            before = self.sent[sequence.index]
            if before[0] < 0:
                continue
            delta, after = news(sequence, *before)
            if delta is not None:
                deltas.append(delta)
                if delta.finish_reason is not None:
                    after = (-1, -1)
            self.sent[sequence.index] = after
        if deltas:
            self.put(deltas)

    def put(self, item: list[StreamDelta] | Exception) -> None:
        """Hand something to the caller's loop; a loop that is closed has nobody to tell."""
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:
            log.debug("the event loop of request id=%s is closed", self.request.request_id)


class AsyncLLM:
    """Many concurrent callers over one ``LLM``.

    Args:
        llm: the model; from now on only this object may use it.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._streams: dict[Request, Stream] = {}
        self._closing = False
        self._draining = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="qnext-engine", daemon=True)
        self._thread.start()

    async def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncIterator[StreamDelta]:
        """Complete one prompt and yield what is new after each step.

        Closing the iterator (or cancelling the task) ends the request within one step.

        Args:
            prompt: a text, token ids, or vLLM's dict of either.
            sampling_params: None takes the model's defaults.
            priority: lower goes first.

        Raises:
            RequestError: it can never be served.
            EngineError: the engine has stopped or fails.
        """
        async with self.open(prompt, sampling_params, priority=priority) as stream:
            while stream.num_open:
                for delta in await stream.take():
                    yield delta

    @asynccontextmanager
    async def open(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncIterator[Stream]:
        """A queued request for the length of a block; leaving early ends it within one step.

        Raises:
            RequestError: it can never be served.
            EngineError: the engine has stopped.
        """
        stream = await self._submit(prompt, sampling_params, priority)
        try:
            yield stream
        finally:
            if stream.num_open:
                self._send(partial(self._abort, stream.request), urgent=True)

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> RequestOutput:
        """Complete one prompt and return it whole.

        Raises:
            RequestError: it can never be served.
            EngineError: the engine has stopped or fails.
        """
        async with self.open(prompt, sampling_params, priority=priority) as stream:
            while stream.num_open:
                await stream.take()
        return self.llm.output(stream.request)

    async def call(self, function: Callable[[LLM], Any]) -> Any:
        """Run ``function(llm)`` between two steps, on the engine's thread."""
        done: Future[Any] = Future()

        def run() -> None:
            try:
                done.set_result(function(self.llm))
            except Exception as error:
                done.set_exception(error)

        self._send(run)
        return await asyncio.wrap_future(done)

    @property
    def is_alive(self) -> bool:
        """Whether requests can be served."""
        return self._thread.is_alive() and self._failure is None and not self._closing

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def shutdown(self, *, drain: bool = True) -> None:
        """Stop; with ``drain`` open requests are finished first, otherwise they are aborted."""
        with self._wake:
            self._draining, self._closing = drain, True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self.llm.close)

    async def _submit(self, prompt: Prompt, params: SamplingParams | None, priority: int) -> Stream:
        if params is None:
            params = self.llm.get_default_sampling_params()
        # Tokenising and compiling a grammar take time that no other stream should wait for.
        make = await asyncio.to_thread(self.llm.prepare, parse_prompt(prompt), params, priority)
        loop, done = asyncio.get_running_loop(), Future[Stream]()

        def add() -> None:
            try:
                request = make()
                count = len(request.sequences)
                stream = Stream(request, loop, asyncio.Queue(), [(0, 0)] * count, count)
                self._streams[request] = stream
                if not done.set_running_or_notify_cancel():
                    self._abort(request)
                else:
                    done.set_result(stream)
            except Exception as error:
                done.set_exception(error)

        def undo() -> None:
            if done.done() and not done.cancelled() and done.exception() is None:
                self._abort(done.result().request)

        self._send(add)
        try:
            return await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            self._send(undo, urgent=True)
            raise

    def _send(self, command: Callable[[], None], *, urgent: bool = False) -> None:
        """Hand the thread a command; an ``urgent`` one (abort) also while it shuts down."""
        with self._wake:
            if urgent and (self._failure is not None or not self._thread.is_alive()):
                return  # everything has ended already
            if self._failure is not None or not self._thread.is_alive():
                raise EngineError("the engine has stopped", hint="see the log for the reason")
            if self._closing and not urgent:
                raise EngineError("the engine is shutting down and takes no more requests")
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        """The thread: commands, a step, what is new; asleep while there is nothing to do."""
        engine, failures = self.llm.engine, 0
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._commands or engine.has_work or self._closing)
                commands = list(self._commands)
                self._commands.clear()
                stopping = self._closing and not (self._draining and engine.has_work)
            for command in commands:
                command()
            if stopping:
                break
            try:
                if engine.step():  # a step without work proves nothing
                    failures = 0
            except Exception as error:
                failures += 1
                log.exception("an engine step failed")
                if failures >= _FAILURES:
                    self._failure = error
                    break
                self._fail_all(error)
            self._publish()
        self._fail_all(self._failure or EngineError("the engine was shut down"))

    def _publish(self) -> None:
        streams = list(self._streams.items())
        for request, stream in streams:
            if request.finished:
                del self._streams[request]
            stream.push()

    def _abort(self, request: Request) -> None:
        if self._streams.pop(request, None) is not None:
            self.llm.engine.abort(request)

    def _fail_all(self, error: BaseException) -> None:
        """End every request: its caller gets the error."""
        for request, stream in list(self._streams.items()):
            self.llm.engine.abort(request)
            failure = error if isinstance(error, EngineError) else EngineError(f"failed: {error}")
            stream.put(failure)
        self._streams.clear()
