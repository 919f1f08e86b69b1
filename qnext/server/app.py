"""The application: every path and what answers it. The work is in the modules named in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from qnext import __version__
from qnext.server.anthropic import (
    CountBody,
    MessagesBody,
    message_events,
    to_chat,
    whole_message,
)
from qnext.server.chat import chat_chunks, render, whole_chat
from qnext.server.completions import completion_chunks, whole_completion
from qnext.server.errors import HANDLED, Refusal, handle, handle_validation, json_response
from qnext.server.gate import Gate
from qnext.server.memory import Memory
from qnext.server.metrics import CONTENT_TYPE
from qnext.server.responses import ResponsesBody, response_events, whole_response
from qnext.server.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    StreamOptions,
    TokenizeBody,
)
from qnext.server.service import Loaded, Service
from qnext.server.streaming import EventStream, started, unless_gone
from qnext.server.tokens import detokenize, tokenize

Chunks = AsyncGenerator[dict[str, Any], None]


def create_app(service: Service) -> ASGIApp:
    """The server as an ASGI application."""
    app = FastAPI(title="qnext", version=__version__, docs_url=None, redoc_url=None)
    for kind in HANDLED:
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(RequestValidationError, handle_validation)
    _add_status(app, service)
    _add_openai(app, service)
    _add_responses(app, service)
    _add_anthropic(app, service)
    _add_tokens(app, service)
    gate: ASGIApp = Gate(app, service.options, service.metrics.http)
    origins = service.options.allowed_origins
    if origins:
        headers = ["Authorization", "Content-Type"]
        gate = CORSMiddleware(
            gate, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=headers
        )
    return gate


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while the process can still come to serve: also while it loads."""
        loaded = service.loaded
        dead = loaded is not None and not loaded.engine.is_alive and service.phase == "ready"
        well = not dead and service.phase != "failed"
        return json_response({"status": "ok" if well else "failed"}, 200 if well else 503)

    @app.get("/ready")
    async def ready() -> Response:
        """200 when a request sent now would be served."""
        service.ready()
        return json_response({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _add_openai(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        """The one model."""
        return json_response({"object": "list", "data": [_model(service.ready())]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """The model by its name."""
        return json_response(_model(service.ready(name)))

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue prompts."""
        loaded = service.ready(body.model)
        chunks = completion_chunks(service, loaded, body, request.state.key)
        return await _answer(request, chunks, whole_completion, body.stream, body.stream_options)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        loaded = service.ready(body.model)
        chunks = chat_chunks(service, loaded, body, request.state.key)
        return await _answer(request, chunks, whole_chat, body.stream, body.stream_options)


def _add_responses(app: FastAPI, service: Service) -> None:
    memory = Memory()

    @app.post("/v1/responses")
    async def create(body: ResponsesBody, request: Request) -> Response:
        """Answer, and remember it unless told otherwise."""
        loaded = service.ready(body.model)
        events = response_events(service, loaded, memory, body, request.state.key)
        if not body.stream:
            return json_response(await unless_gone(request, _whole(whole_response, events)))
        return EventStream(await unless_gone(request, started(events)), done=None, named=True)

    @app.get("/v1/responses/{name}")
    async def retrieve(name: str, request: Request) -> Response:
        """A remembered response."""
        return json_response(memory.response(name, request.state.key))

    @app.delete("/v1/responses/{name}")
    async def delete(name: str, request: Request) -> Response:
        """Forget a response."""
        memory.forget(name, request.state.key)
        return json_response({"id": name, "object": "response", "deleted": True})


def _add_anthropic(app: FastAPI, service: Service) -> None:
    @app.post("/v1/messages")
    async def messages(body: MessagesBody, request: Request) -> Response:
        """Answer a conversation, in Anthropic's words."""
        loaded = service.ready(body.model)
        events = message_events(service, loaded, body, request.state.key)
        if not body.stream:
            return json_response(await unless_gone(request, _whole(whole_message, events)))
        begun = await unless_gone(request, started(events))
        return EventStream(begun, done=None, named=True, path=request.url.path)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountBody) -> Response:
        """Tokens of a conversation."""
        loaded = service.ready(body.model)

        def count() -> int:
            chat = to_chat(loaded, body)
            text = render(loaded, chat.messages, chat.tools, {})
            return len(loaded.tokenizer.encode(text))

        return json_response({"input_tokens": await asyncio.to_thread(count)})


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def to_tokens(body: TokenizeBody) -> Response:
        """Text to ids."""
        loaded = service.ready(body.model)
        return json_response(await asyncio.to_thread(tokenize, loaded, body))

    @app.post("/detokenize")
    async def to_text(body: DetokenizeBody) -> Response:
        """Ids to text."""
        loaded = service.ready(body.model)
        return json_response(await asyncio.to_thread(detokenize, loaded, body))


async def _answer(
    request: Request,
    chunks: Chunks,
    whole: Callable[[Chunks], Awaitable[dict[str, Any]]],
    stream: bool | None,
    options: StreamOptions | None,
) -> Response:
    """One answer from its chunks, whole or as a stream: they cannot differ."""
    if not stream:
        if options is not None:
            await chunks.aclose()
            raise Refusal("stream_options needs stream: true", param="stream_options")
        return json_response(await unless_gone(request, _whole(whole, chunks)))
    begun = await unless_gone(request, started(chunks))
    return EventStream(_chosen(begun, options or StreamOptions()))


async def _whole(
    whole: Callable[[Chunks], Awaitable[dict[str, Any]]], chunks: Chunks
) -> dict[str, Any]:
    return await whole(chunks)


async def _chosen(chunks: Chunks, options: StreamOptions) -> Chunks:
    """The chunks with as much usage as was asked for, and none that is empty."""
    try:
        async for chunk in chunks:
            if not chunk["choices"] and not (options.include_usage and "usage" in chunk):
                continue
            if options.include_usage:
                chunk.setdefault("usage", None)
            yield chunk
    finally:
        await chunks.aclose()


def _model(loaded: Loaded) -> dict[str, Any]:
    return {
        "id": loaded.name,
        "object": "model",
        "created": loaded.created,
        "owned_by": "qnext",
        "max_model_len": loaded.engine.llm.max_model_len,
    }
