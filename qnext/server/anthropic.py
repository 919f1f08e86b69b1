"""``/v1/messages``: Anthropic's words for the same conversations, so that coding agents connect.

A body becomes a ``ChatBody`` and runs as one; its deltas become content blocks.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Literal, cast

from pydantic import Field, ValidationError, model_validator

from qnext.server.chat import answer_deltas, plan
from qnext.server.errors import Refusal, validation_refusal
from qnext.server.refused import Refused
from qnext.server.schema import Body, ChatBody
from qnext.server.service import Loaded, Service

REFUSED = {
    "container": Refused("nothing is executed on this server"),
    "context_management": Refused("the server edits no conversations"),
    "diagnostics": Refused("there are none"),
    "inference_geo": Refused("the server is where it is"),
    "mcp_servers": Refused("the server calls nobody", ([],)),
    "output_config": Refused("use /v1/chat/completions with response_format"),
    "service_tier": Refused("there is one", ("auto", "standard_only")),
    "speed": Refused("there is one", ("standard",)),
    "user_profile_id": Refused("nothing is stored on this server"),
    "workspace_id": Refused("nothing is stored on this server"),
}

_FINISH = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageBody(Body):
    """One turn; content blocks are checked where they are converted."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class ToolBody(Body):
    """A tool of the client; ``type`` custom is the only one."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoiceBody(Body):
    """auto, any (some tool), tool (this one) or none."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingBody(Body):
    """``budget_tokens`` is kept exactly; adaptive has none."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=0)


class MetadataBody(Body):
    """Accepted; there is no abuse monitoring."""

    user_id: str | None = None


class CountBody(Body):
    """``POST /v1/messages/count_tokens``."""

    refused = REFUSED
    model: str | None = None
    messages: list[MessageBody] = Field(min_length=1, max_length=4096)
    system: str | list[dict[str, Any]] | None = None
    tools: list[ToolBody] | None = Field(None, max_length=128)
    tool_choice: ToolChoiceBody | None = None
    thinking: ThinkingBody | None = None
    cache_control: dict[str, Any] | None = None


class MessagesBody(CountBody):
    """``POST /v1/messages``."""

    max_tokens: int = Field(ge=1)
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    stop_sequences: list[str] | None = None
    metadata: MetadataBody | None = None

    @model_validator(mode="after")
    def _named(self) -> MessagesBody:
        choice = self.tool_choice
        if choice is not None and (choice.type == "tool") != (choice.name is not None):
            raise ValueError("tool_choice: a name comes with type tool, and only then")
        return self


def to_chat(loaded: Loaded, body: CountBody) -> ChatBody:
    """The same request in OpenAI's words.

    Raises:
        Refusal: it has none.
    """
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for number, message in enumerate(body.messages):
        messages += _turn(message, f"messages.{number}")
    chat: dict[str, Any] = {"messages": messages}
    if body.tools:
        chat["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.input_schema,
                    "strict": tool.strict,
                },
            }
            for tool in body.tools
        ]
    choice = body.tool_choice
    if choice is not None:
        named = {"type": "function", "function": {"name": choice.name}}
        words = {"auto": "auto", "any": "required", "none": "none", "tool": named}
        chat["tool_choice"] = words[choice.type]
        chat["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    thinking = body.thinking
    if thinking is not None and thinking.type == "disabled":
        chat["reasoning_effort"] = "none"
    elif thinking is not None:
        if not loaded.format.reasoning:
            raise Refusal("this model does not think", param="thinking")
        chat["max_thinking_tokens"] = thinking.budget_tokens
    if isinstance(body, MessagesBody):
        chat |= {
            "max_tokens": body.max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stop": body.stop_sequences,
        }
    try:
        return ChatBody.model_validate(chat)
    except ValidationError as error:
        raise validation_refusal(cast("list[dict[str, Any]]", error.errors())) from None


async def message_events(
    service: Service, loaded: Loaded, body: MessagesBody, key: str
) -> AsyncGenerator[dict[str, Any], None]:
    """Anthropic's events of one answer."""
    chat = to_chat(loaded, body)
    ready = await asyncio.to_thread(plan, service, loaded, chat)
    blocks = Blocks()
    stop: dict[str, Any] = {"stop_reason": "end_turn", "stop_sequence": None}
    async with aclosing(answer_deltas(service, loaded, ready, key)) as news:
        async for pieces, counts in news:
            if not blocks.began:
                blocks.began = True
                yield {"type": "message_start", "message": _message(loaded, counts or {})}
                continue
            for piece in pieces:
                for event in blocks.push(piece["delta"]):
                    yield event
                if piece["finish_reason"] is not None:
                    stop = _stop(piece, called=blocks.called)
            if not pieces and counts is not None:
                for event in blocks.close():
                    yield event
                yield {"type": "message_delta", "delta": stop, "usage": _usage(counts)}
    yield {"type": "message_stop"}


async def whole_message(events: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any]:
    """All events added up to one answer."""
    message: dict[str, Any] = {}
    partial = ""
    async with aclosing(events) as each:
        async for event in each:
            if event["type"] == "message_start":
                message = event["message"]
            elif event["type"] == "content_block_start":
                message["content"].append(dict(event["content_block"]))
                partial = ""
            elif event["type"] == "content_block_delta":
                block, delta = message["content"][-1], event["delta"]
                if delta["type"] == "input_json_delta":
                    partial += delta["partial_json"]
                    block["input"] = json.loads(partial)
                else:
                    name = "text" if delta["type"] == "text_delta" else "thinking"
                    block[name] += delta[name]
            elif event["type"] == "message_delta":
                message |= {**event["delta"], "usage": event["usage"]}
    return message


class Blocks:
    """Content blocks as deltas come: text, thinking and calls each open their own."""

    def __init__(self) -> None:
        self.began = self.called = False
        self._index = -1
        self._open: str | None = None

    def push(self, delta: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Events of one of our deltas."""
        if delta.get("reasoning_content"):
            thought = delta["reasoning_content"]
            yield from self._enter("thinking", {"thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": thought})
        if delta.get("content"):
            yield from self._enter("text", {"text": ""})
            yield self._delta({"type": "text_delta", "text": delta["content"]})
        for call in delta.get("tool_calls", ()):
            self.called = True
            yield from self.close()
            name = call["function"]["name"]
            identity = call["id"].replace("call_", "toolu_", 1)
            yield from self._enter("tool_use", {"id": identity, "name": name, "input": {}})
            arguments = call["function"]["arguments"]
            yield self._delta({"type": "input_json_delta", "partial_json": arguments})
            yield from self.close()

    def close(self) -> Iterator[dict[str, Any]]:
        """End the open block."""
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self._index}

    def _enter(self, kind: str, empty: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self._open == kind:
            return
        yield from self.close()
        self._open = kind
        self._index += 1
        block = {"type": kind, **empty}
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _message(loaded: Loaded, counts: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": loaded.name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(counts),
    }


def _usage(counts: dict[str, Any]) -> dict[str, Any]:
    """Anthropic counts what came from the cache apart."""
    cached = counts["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": counts["prompt_tokens"] - cached,
        "output_tokens": counts["completion_tokens"],
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
    }


def _stop(piece: dict[str, Any], *, called: bool) -> dict[str, Any]:
    text = piece.get("stop_reason")
    if isinstance(text, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": text}
    reason = _FINISH.get(piece["finish_reason"], "end_turn")
    if called and reason == "end_turn":  # a named tool: OpenAI says stop
        reason = "tool_use"
    return {"stop_reason": reason, "stop_sequence": None}


def _turn(message: MessageBody, where: str) -> list[dict[str, Any]]:
    """One turn as one or more messages: results of tools come before the text beside them."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts, thoughts, calls, results = [], [], [], []
    for number, block in enumerate(message.content):
        place = f"{where}.content.{number}"
        try:
            kind = block["type"]
            if kind == "text":
                texts.append(block["text"])
            elif kind == "thinking" and message.role == "assistant":
                thoughts.append(block["thinking"])
            elif kind == "tool_use" and message.role == "assistant":
                function = {"name": block["name"], "arguments": block["input"]}
                calls.append({"id": block["id"], "type": "function", "function": function})
            elif kind == "tool_result" and message.role == "user":
                content = _text(block.get("content") or "", place)
                identity = block["tool_use_id"]
                results.append({"role": "tool", "tool_call_id": identity, "content": content})
            else:
                raise Refusal(f"{place}: a {kind!r} block is not supported here", param=place)
        except KeyError as missing:
            raise Refusal(f"{place}: {missing} is missing", param=place) from None
    found: dict[str, Any] = {"role": message.role}
    if texts:
        found["content"] = [{"type": "text", "text": text} for text in texts]
    if thoughts:
        found["reasoning_content"] = "\n".join(str(thought) for thought in thoughts)
    if calls:
        found["tool_calls"] = calls
    return results + ([found] if len(found) > 1 else [])


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or any(
        not isinstance(block, dict)
        or block.get("type") != "text"
        or not isinstance(block.get("text"), str)
        for block in content
    ):
        raise Refusal(f"{where}: text and text blocks only", param=where)
    return "\n".join(block["text"] for block in content)
