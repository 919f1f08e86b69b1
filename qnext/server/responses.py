"""``/v1/responses``: OpenAI's newer words for conversations, which the server can remember.

A body becomes a ``ChatBody`` and runs as one; its deltas become output items. What is remembered
for ``previous_response_id`` lies in memory, bounded, for the key that made it (memory.py).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Literal, cast

from pydantic import Field, ValidationError

from qnext.server.chat import answer_deltas, plan
from qnext.server.errors import Refusal, validation_refusal
from qnext.server.memory import Memory
from qnext.server.refused import COMMON, Refused
from qnext.server.schema import Body, ChatBody, Effort
from qnext.server.service import Loaded, Service

REFUSED = {
    **{name: row for name, row in COMMON.items() if name not in ("store", "metadata")},
    "access_programs": Refused("nothing is executed on this server"),
    "background": Refused("every response is awaited", (False,)),
    "background_options": Refused("every response is awaited"),
    "context_management": Refused("the server edits no conversations"),
    "conversation": Refused("use previous_response_id"),
    "image": Refused("the model reads and writes text only"),
    "include": Refused("there is nothing more to include", ([],)),
    "max_tool_calls": Refused("the server runs no tools"),
    "prompt": Refused("nothing is stored on this server"),
    "stream_options": Refused("usage is in the last event", ({}, {"include_obfuscation": False})),
    "top_logprobs": Refused("use /v1/chat/completions", (0,)),
    "truncation": Refused("a prompt that does not fit is refused", ("disabled",)),
}


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Body):
    """``tool_choice`` of one function."""

    type: Literal["function"]
    name: str


class TextFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Body):
    """``text`` of a body."""

    refused = {"verbosity": Refused("the model has no such control", ("medium",))}  # noqa: RUF012
    format: TextFormat | None = None


class Reasoning(Body):
    """``reasoning`` of a body."""

    refused = {  # noqa: RUF012
        "summary": Refused("thoughts come as they are"),
        "generate_summary": Refused("thoughts come as they are"),
        "context": Refused("thoughts come as they are"),
        "mode": Refused("there is one"),
    }
    effort: Effort | None = None


class ResponsesBody(Body):
    """``POST /v1/responses``."""

    refused = REFUSED
    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    store: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    tools: list[FunctionTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)
    prompt_cache_key: str | None = Field(None, max_length=512)


def to_chat(body: ResponsesBody, before: list[dict[str, Any]]) -> ChatBody:
    """The same request as a chat.

    Args:
        body: what was asked.
        before: the remembered conversation.

    Raises:
        Refusal: an item that has no such form.
    """
    messages = [*before, *_messages(body.input)]
    if body.instructions:
        messages.insert(0, {"role": "system", "content": body.instructions})
    chat: dict[str, Any] = {
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": body.reasoning and body.reasoning.effort,
    }
    if body.tools:
        tools = [tool.model_dump(exclude={"type"}) for tool in body.tools]
        chat["tools"] = [{"type": "function", "function": tool} for tool in tools]
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        chat["tool_choice"] = choice
    form = None if body.text is None else body.text.format
    if form is not None:
        chat["response_format"] = {"type": form.type}
        if form.type == "json_schema":
            schema = form.model_dump(by_alias=True, exclude={"type"})
            chat["response_format"]["json_schema"] = schema
    try:
        return ChatBody.model_validate(chat)
    except ValidationError as error:
        raise validation_refusal(cast("list[dict[str, Any]]", error.errors())) from None


async def response_events(
    service: Service, loaded: Loaded, memory: Memory, body: ResponsesBody, key: str
) -> AsyncGenerator[dict[str, Any], None]:
    """OpenAI's events of one response."""
    before = memory.recall(body.previous_response_id, key) if body.previous_response_id else []
    chat = to_chat(body, before)
    ready = await asyncio.to_thread(plan, service, loaded, chat)
    response, items = _response(loaded, body), Items()
    number, began = 0, False

    def event(kind: str, **more: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"type": f"response.{kind}", "sequence_number": number - 1, **more}

    async with aclosing(answer_deltas(service, loaded, ready, key)) as news:
        async for pieces, counts in news:
            if not began:
                began = True
                for kind in ("created", "in_progress"):
                    yield event(kind, response=dict(response))
                continue
            for piece in pieces:
                for kind, more in items.push(piece["delta"]):
                    yield event(kind, **more)
                if piece["finish_reason"] == "length":
                    response["incomplete_details"] = {"reason": "max_output_tokens"}
            if not pieces and counts is not None:
                response["usage"] = _usage(counts)
    cut = response["incomplete_details"] is not None
    response["status"] = items.status = "incomplete" if cut else "completed"
    for kind, more in items.close():
        yield event(kind, **more)
    response["output"] = items.done
    if body.store is not False:
        kept = [*before, *_messages(body.input), *_messages(items.done)]
        memory.keep(response["id"], key, kept, response)
    yield event(response["status"], response=response)


async def whole_response(events: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any]:
    """The response of the last event."""
    found: dict[str, Any] = {}
    async with aclosing(events) as each:
        async for event in each:
            found = event.get("response", found)
    return found


class Items:
    """Output items as deltas come: reasoning, a message, calls."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self.status = "completed"
        self._item: dict[str, Any] | None = None
        self._text = ""

    def push(self, delta: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Events (kind, fields) of one of our deltas."""
        if delta.get("reasoning_content"):
            yield from self._say("reasoning", delta["reasoning_content"])
        if delta.get("content"):
            yield from self._say("message", delta["content"])
        for call in delta.get("tool_calls", ()):
            yield from self.close()
            arguments = call["function"]["arguments"]
            item = {
                "id": f"fc_{uuid.uuid4().hex}",
                "type": "function_call",
                "call_id": call["id"],
                "name": call["function"]["name"],
                "arguments": "",
                "status": "in_progress",
            }
            place = {"output_index": len(self.done)}
            yield "output_item.added", {**place, "item": dict(item)}
            place["item_id"] = item["id"]
            yield "function_call_arguments.delta", {**place, "delta": arguments}
            yield "function_call_arguments.done", {**place, "arguments": arguments}
            item |= {"arguments": arguments, "status": "completed"}
            yield "output_item.done", {"output_index": len(self.done), "item": item}
            self.done.append(item)

    def close(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """End the open item."""
        item = self._item
        if item is None:
            return
        place = {"output_index": len(self.done), "item_id": item["id"], "content_index": 0}
        part = self._part(item, self._text)
        if item["type"] == "message":
            yield "output_text.done", {**place, "text": self._text, "logprobs": []}
            yield "content_part.done", {**place, "part": part}
        else:
            yield "reasoning_text.done", {**place, "text": self._text}
        item |= {"content": [part], "status": self.status}
        yield "output_item.done", {"output_index": len(self.done), "item": item}
        self.done.append(item)
        self._item, self._text = None, ""

    def _say(self, kind: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._item is None or self._item["type"] != kind:
            yield from self.close()
            yield from self._begin(kind)
        assert self._item is not None
        self._text += text
        place = {"output_index": len(self.done), "item_id": self._item["id"], "content_index": 0}
        if kind == "message":
            yield "output_text.delta", {**place, "delta": text, "logprobs": []}
        else:
            yield "reasoning_text.delta", {**place, "delta": text}

    def _begin(self, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        name = "msg" if kind == "message" else "rs"
        item = {"id": f"{name}_{uuid.uuid4().hex}", "type": kind, "content": [], **more}
        self._item = item = {**item, "status": "in_progress"}
        yield "output_item.added", {"output_index": len(self.done), "item": dict(item)}
        if kind == "message":
            place = {"output_index": len(self.done), "item_id": item["id"], "content_index": 0}
            yield "content_part.added", {**place, "part": self._part(item, "")}

    def _part(self, item: dict[str, Any], text: str) -> dict[str, Any]:
        if item["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _response(loaded: Loaded, body: ResponsesBody) -> dict[str, Any]:
    choice = body.tool_choice
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": loaded.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "store": body.store is not False,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tool_choice": choice.model_dump() if isinstance(choice, NamedTool) else choice or "auto",
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "usage": None,
    }


def _usage(counts: dict[str, Any]) -> dict[str, Any]:
    thought = counts.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": counts["total_tokens"],
    }


def _messages(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as messages; what the assistant thought, said and called is one message."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    found: list[dict[str, Any]] = []
    own: dict[str, Any] | None = None
    for number, item in enumerate(given):
        place = f"input.{number}"
        try:
            kind = item.get("type", "message")
            if kind == "function_call_output":
                output = item["output"]
                text = output if isinstance(output, str) else _parts(output, place)
                message = {"role": "tool", "tool_call_id": item["call_id"], "content": text}
            elif kind == "message" and item["role"] != "assistant":
                content = item["content"]
                text = content if isinstance(content, str) else _parts(content, place)
                message = {"role": item["role"], "content": text}
            else:
                if own is None:
                    own = {"role": "assistant"}
                    found.append(own)
                _join(own, item, kind, place)
                continue
        except KeyError as missing:
            raise Refusal(f"{place}: {missing} is missing", param=place) from None
        own = None
        found.append(message)
    return found


def _join(own: dict[str, Any], item: dict[str, Any], kind: str, place: str) -> None:
    """Add an item of the assistant to its message."""
    if kind == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        own.setdefault("tool_calls", []).append(call)
    elif kind in ("message", "reasoning"):
        content = item["content"] if kind == "message" else item.get("content") or []
        text = content if isinstance(content, str) else _parts(content, place)
        name = "content" if kind == "message" else "reasoning_content"
        own[name] = own.get(name, "") + text
    else:
        raise Refusal(f"{place}: an item of type {kind!r} is not supported", param=place)


def _parts(content: Any, place: str) -> str:
    known = ("input_text", "output_text", "text", "reasoning_text")
    if not isinstance(content, list) or any(
        not isinstance(part, dict)
        or part.get("type") not in known
        or not isinstance(part.get("text"), str)
        for part in content
    ):
        raise Refusal(f"{place}: text parts only", param=place)
    return "".join(part["text"] for part in content)
