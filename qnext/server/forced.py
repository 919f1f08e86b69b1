"""Tool calls that must happen (``tool_choice`` required or named), by a grammar.

The answer is a JSON list of ``{"name", "arguments"}``, arguments by each function's schema. Tags
such as ``<tool_call>`` are control tokens, which no grammar writes; the list carries the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qnext.server.schema import Tool
from qnext.text import ContentDelta, ToolCall

MAX_CALLS = 16
"""Most calls in one forced answer: a model that never closes the list must end somewhere."""


def calls_schema(tools: Sequence[Tool], *, parallel: bool) -> dict[str, Any]:
    """JSON schema of a list of calls of ``tools``.

    Each function's schema moves below ``$defs``, and its own references with it.
    """
    definitions, options = {}, []
    for number, tool in enumerate(tools):
        place = f"#/$defs/tool{number}"
        parameters = tool.function.parameters or {"type": "object", "additionalProperties": False}
        definitions[f"tool{number}"] = _moved(parameters, place)
        options.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": {"$ref": place}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {
        "type": "array",
        "minItems": 1,
        "maxItems": MAX_CALLS if parallel else 1,
        "items": {"anyOf": options},
        "$defs": definitions,
    }


def _moved(schema: Any, place: str) -> Any:
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    moved.pop("$schema", None)
    moved.pop("$id", None)
    return moved


class ForcedCalls:
    """Reads the list while it streams; each call comes out when it is whole."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._depth = 0
        self._start = -1
        self._quoted = self._escaped = False
        self._count = 0

    def push(self, text: str) -> list[ToolCall]:
        """Calls that are complete after ``text``."""
        self._text += text
        found = []
        while self._at < len(self._text):
            char = self._text[self._at]
            self._at += 1
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = self._quoted
            elif char == '"':
                self._quoted = not self._quoted
            elif self._quoted:
                continue
            elif char in "[{":
                self._depth += 1
                if self._depth == 2:
                    self._start = self._at - 1
            elif char in "]}":
                self._depth -= 1
                if self._depth == 1:
                    found.append(self._call(self._text[self._start : self._at]))
                    self._text, self._at, self._start = self._text[self._at :], 0, -1
        return found

    def finish(self) -> list[ContentDelta]:
        """A call that was cut off, as text: nothing the model said is lost."""
        if self._start < 0:
            return []
        rest, self._start = self._text[self._start :], -1
        return [ContentDelta(rest)]

    def _call(self, text: str) -> ToolCall:
        call = json.loads(text)
        self._count += 1
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        return ToolCall(self._count - 1, call["name"], arguments)
