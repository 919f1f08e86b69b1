"""Inside of a tool call: JSON (Hermes, Qwen3) or XML (Coder) to a name and JSON arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

Call = tuple[str, str]
"""Function name and its arguments as the JSON text of an object."""


class ToolCallBody(Protocol):
    """How the text between ``<tool_call>`` and ``</tool_call>`` is read."""

    def may_end(self, body: str) -> bool:
        """Whether a closing tag after ``body`` closes the call; False inside of a value."""

    def read(self, body: str) -> Call | None:
        """The call, None if ``body`` is none."""


class HermesBody:
    """``{"name": ..., "arguments": {...}}``."""

    def may_end(self, body: str) -> bool:
        """False inside an open JSON string."""
        return re.sub(r"\\.", "", body, flags=re.DOTALL).count('"') % 2 == 0

    def read(self, body: str) -> Call | None:
        """The call; arguments that are JSON text once more are read too."""
        call = _json(body)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
            return None
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments)
        if not isinstance(arguments, dict):
            return None
        return call["name"], _dumps(arguments)


class CoderXmlBody:
    """``<function=NAME>`` with one ``<parameter=KEY>`` per argument; types follow the schema.

    Args:
        tools: the definitions the model was shown. Values of unknown parameters stay texts.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._schemas: dict[str, Mapping[str, Any]] = {}
        for tool in tools:
            function = tool.get("function", tool)
            parameters = function.get("parameters")
            found = parameters.get("properties") if isinstance(parameters, Mapping) else None
            self._schemas[function["name"]] = found if isinstance(found, Mapping) else {}

    def may_end(self, body: str) -> bool:
        """False inside an open parameter."""
        return body.rfind("<parameter=") <= body.rfind("</parameter>")

    def read(self, body: str) -> Call | None:
        """The call; a forgotten ``</function>`` is forgiven."""
        head = _FUNCTION.match(body)
        if head is None:
            return None
        name, at = head[1].strip(), head.end()
        schema = self._schemas.get(name, {})
        arguments: dict[str, Any] = {}
        while (found := _PARAMETER.match(body, at)) is not None:
            key = found[1].strip()
            arguments[key] = _typed(found[2], schema.get(key))
            at = found.end()
        if body[at:].strip() not in ("", "</function>") or not name:
            return None
        return name, _dumps(arguments)


_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>")
_PARAMETER = re.compile(
    r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>(?=\s*(?:<parameter=|</function>|\Z))",
    re.DOTALL,
)
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
_TYPES: dict[str, tuple[type, ...]] = {
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
    "object": (dict,),
    "array": (list,),
}


def _typed(text: str, schema: Any) -> Any:
    """``text`` as the first type of ``schema`` that it can be; the text itself if none fits."""
    types = _schema_types(schema)
    if not types:
        return text
    value = _json(_PYTHON_WORDS.get(text.strip(), text))
    if value is None and text.strip() not in ("null", "None"):
        return text
    if "integer" in types and isinstance(value, float) and value.is_integer():
        value = int(value)
    for name in types:
        fits = isinstance(value, _TYPES.get(name, ()))
        fits = fits and (name == "boolean" or not isinstance(value, bool))
        if fits and (name == "null" or "string" not in types):
            return value
    return text


def _schema_types(schema: Any) -> list[str]:
    if not isinstance(schema, Mapping):
        return []
    found = schema.get("type", [])
    types = [found] if isinstance(found, str) else [t for t in found if isinstance(t, str)]
    for key in ("anyOf", "oneOf"):
        for option in schema.get(key) or ():
            types += _schema_types(option)
    return types


def _json(text: str) -> Any:
    """The value of JSON text, None if it is not JSON (NaN and Infinity are not)."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _dumps(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate escape; keep it escaped
        text = json.dumps(value)
    return text
