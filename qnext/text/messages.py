"""Chat messages and tool definitions, checked and brought to the one form that templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qnext.errors import TextError

ROLES = ("system", "user", "assistant", "tool")


def normalize_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Check messages and bring them to the one form that templates read.

    Content becomes a text (text parts are joined), "developer" becomes "system", "reasoning"
    becomes "reasoning_content", arguments given as JSON text become objects, None is dropped.

    Raises:
        TextError: naming the index of the message that cannot be used.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise TextError(
            "messages must be a list with at least one message",
            hint='for example [{"role": "user", "content": "Hello"}]',
        )
    return [_normalize(message, f"message {i}") for i, message in enumerate(messages)]


def _normalize(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TextError(f"{where} is {type(message).__name__}, not an object with role and content")
    found = {k: plain(v, f"{where}: {k}") for k, v in message.items() if v is not None}
    role = found.get("role")
    role = found["role"] = "system" if role == "developer" else role
    if role not in ROLES:
        raise TextError(f"{where}: role is {role!r}", hint=f"roles: {', '.join(ROLES)}, developer")
    reasoning = found.pop("reasoning", None)
    reasoning = found.setdefault("reasoning_content", reasoning)
    if reasoning is None:
        del found["reasoning_content"]
    elif not isinstance(reasoning, str):
        raise TextError(f"{where}: reasoning_content is not text")
    calls = found.pop("tool_calls", None)
    if calls:
        if role != "assistant":
            raise TextError(f"{where}: tool_calls in a {role} message")
        if not isinstance(calls, list):
            raise TextError(f"{where}: tool_calls is {type(calls).__name__}, not a list")
        found["tool_calls"] = [
            _normalize_call(call, f"{where}: tool call {i}") for i, call in enumerate(calls)
        ]
    if "content" not in found and not calls and reasoning is None:
        raise TextError(f"{where}: no content", hint="only a tool call may come without content")
    found["content"] = _content_text(found.get("content", ""), where)
    return found


def _content_text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TextError(f"{where}: content is {type(content).__name__}, not text")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind not in ("text", "input_text", "output_text"):
            raise TextError(
                f"{where}: content part {i} is {kind!r}", hint="the model reads text parts only"
            )
        if not isinstance(part.get("text"), str):
            raise TextError(f"{where}: content part {i} has no text")
        texts.append(part["text"])
    return "".join(texts)


def _normalize_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TextError(f"{where} has no function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise TextError(f"{where}: arguments are not JSON: {error}") from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise TextError(f"{where}: arguments are {type(arguments).__name__}, not an object")
    return {**call, "function": {**function, "arguments": arguments}}


def check_tools(tools: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Tool definitions as plain data in their own order.

    Raises:
        TextError: naming the tool that has no function name.
    """
    checked = []
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise TextError(
                f"tool {i} has no function name",
                hint='{"type": "function", "function": {"name": ..., "parameters": {...}}}',
            )
        checked.append(plain(tool, f"tool {i}"))
    return checked


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of JSON types only: a template must not reach methods of richer objects."""
    if depth > 64:
        raise TextError(f"{where} is nested more than 64 deep")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TextError(f"{where} has a key that is not text")
        return {str(k): plain(v, where, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where, depth + 1) for item in value]
    raise TextError(f"{where} holds {type(value).__name__}; only JSON values can be shown")
