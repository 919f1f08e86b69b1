"""StructuredOutputsParams: which form an answer must have, by vLLM's names.

What can be refused without a tokenizer is refused here; grammar.py compiles the rest.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, Literal, NamedTuple, NoReturn

from qnext.engine.parameter_errors import nearest_hint
from qnext.errors import RequestError

MAX_TEXT = 256 * 1024
"""Most characters of a schema, a grammar or a list of choices."""

MAX_REGEX = 4096
"""Most characters of a regular expression: time to compile one grows with the square."""

MAX_MULTIPLE = 100_000
"""Largest ``multipleOf``, as the numerator of a fraction: an automaton counts remainders."""

MAX_BLANKS = 256
"""Most characters of ``whitespace_pattern``."""

MAX_DEPTH = 64
"""Deepest nesting of a schema, a regular expression or a grammar."""

FORMS = ("json", "regex", "choice", "grammar", "json_object")


class GrammarSource(NamedTuple):
    """What is compiled, and the key of the cache of compiled grammars."""

    kind: Literal["json", "regex", "choice", "grammar"]
    text: str
    flexible_whitespace: bool = True
    whitespace_pattern: str | None = None


@dataclass(frozen=True, slots=True, init=False)
class StructuredOutputsParams:
    """The form of an answer; exactly one of the first five is given.

    Attributes:
        json: a JSON schema, kept as text; also given as a dict or a pydantic model class.
        regex: the whole answer matches this regular expression (no look-around, no references
            to groups).
        choice: the answer is one of these texts.
        grammar: EBNF, either GBNF (``root ::= ...``) or Lark (``start: ...``).
        json_object: any JSON object.
        disable_any_whitespace: JSON without blanks between its parts.
        whitespace_pattern: regular expression of the blanks between the parts of JSON.

    Raises:
        RequestError: none or several forms, or one that is too large, too deep or no schema.
    """

    json: str | None
    regex: str | None
    choice: tuple[str, ...] | None
    grammar: str | None
    json_object: bool | None
    disable_any_whitespace: bool
    whitespace_pattern: str | None

    def __init__(
        self,
        *,
        json: str | dict[str, Any] | bool | type | None = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        grammar: str | None = None,
        json_object: bool | None = None,
        disable_any_whitespace: bool = False,
        whitespace_pattern: str | None = None,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            hint = nearest_hint(name, [field.name for field in fields(self)])
            raise RequestError(f"StructuredOutputsParams has no parameter {name!r}", hint=hint)
        if isinstance(choice, (list, tuple)):
            choice = tuple(choice)
        values = {
            "json": None if json is None else _schema_text(json),
            "regex": regex,
            "choice": choice,
            "grammar": grammar,
            "json_object": json_object,
            "disable_any_whitespace": disable_any_whitespace,
            "whitespace_pattern": whitespace_pattern,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check_types()
        self._check_form()

    @property
    def source(self) -> GrammarSource:
        """What grammar.py compiles."""
        if self.regex is not None:
            return GrammarSource("regex", self.regex)
        if self.choice is not None:
            return GrammarSource("choice", jsonlib.dumps(self.choice))
        if self.grammar is not None:
            return GrammarSource("grammar", self.grammar)
        text = '{"type": "object"}' if self.json is None else self.json
        if text.strip() == "true":  # any value; llguidance takes objects only
            text = "{}"
        return GrammarSource("json", text, not self.disable_any_whitespace, self.whitespace_pattern)

    def _check_types(self) -> None:
        for name in ("regex", "grammar", "whitespace_pattern"):
            if not isinstance(getattr(self, name), (str, type(None))):
                _refuse(f"{name} must be a text, found {type(getattr(self, name)).__name__}")
        if self.choice is not None and not (
            isinstance(self.choice, tuple) and all(isinstance(text, str) for text in self.choice)
        ):
            _refuse("choice must be a list of texts")
        for name in ("json_object", "disable_any_whitespace"):
            if getattr(self, name) not in (True, False, None):
                _refuse(f"{name}={getattr(self, name)!r} must be True or False")

    def _check_form(self) -> None:
        given = [name for name in FORMS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            _refuse(f"give exactly one of {', '.join(FORMS)}; found {found}")
        name, source = given[0], self.source
        if self.choice is not None and (not self.choice or "" in self.choice):
            _refuse("choice must name at least one text, and none may be empty")
        if not source.text.strip():
            _refuse(f"{name} must not be empty")
        limit = MAX_REGEX if source.kind == "regex" else MAX_TEXT
        if len(source.text) > limit:
            _refuse(f"{name} has {len(source.text)} characters; at most {limit} are allowed")
        if source.kind != "choice" and depth(source.text) > MAX_DEPTH:
            _refuse(f"{name} is nested more than {MAX_DEPTH} deep")
        if source.kind == "json":
            _check_schema(source.text)
        if self.whitespace_pattern is not None and len(self.whitespace_pattern) > MAX_BLANKS:
            _refuse(f"whitespace_pattern has more than {MAX_BLANKS} characters")
        if source.kind != "json" and (self.disable_any_whitespace or self.whitespace_pattern):
            _refuse(f"disable_any_whitespace and whitespace_pattern are of json, not of {name}")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            _refuse("disable_any_whitespace and whitespace_pattern contradict each other")


def depth(text: str) -> int:
    """Deepest nesting of brackets of any kind outside of double-quoted strings.

    It guards recursive parsers: they must never see a text nested deeper than it says.
    """
    deepest = now = 0
    quoted = escaped = False
    for char in text:
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == '"':
            quoted = not quoted
        elif not quoted and char in "([{":
            now += 1
            deepest = max(deepest, now)
        elif not quoted and char in ")]}":
            now -= 1
    return deepest


def _schema_text(value: Any) -> str:
    """One text per schema, whatever it came as, so that equal schemas share a grammar."""
    if isinstance(value, str):
        return value
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    if not isinstance(value, (dict, bool)):
        _refuse(f"json must be a schema: a text, a dict or a model, found {type(value).__name__}")
    try:
        return jsonlib.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        _refuse(f"json is nested more than {MAX_DEPTH} deep")
    except (TypeError, ValueError) as error:
        _refuse(f"json is no JSON: {error}")


def _check_schema(text: str) -> None:
    try:
        schema = jsonlib.loads(text)
    except ValueError as error:
        _refuse(f"json is no JSON: {error}")
    if schema is False:
        _refuse("json is the schema false, which allows no text")
    if schema is not True and not isinstance(schema, dict):
        _refuse(f"json must be a schema, which is an object; found {type(schema).__name__}")
    _check_parts(schema)


def _check_parts(part: Any) -> None:
    """Refuse patterns that are too long and multiples that are too large, anywhere."""
    if isinstance(part, list):
        for item in part:
            _check_parts(item)
    if not isinstance(part, dict):
        return
    patterns = [part.get("pattern"), *_keys(part.get("patternProperties"))]
    longest = max((len(text) for text in patterns if isinstance(text, str)), default=0)
    if longest > MAX_REGEX:
        _refuse(f"json has a pattern of {longest} characters; at most {MAX_REGEX} are allowed")
    multiple = part.get("multipleOf")
    if isinstance(multiple, (int, float)) and Fraction(str(multiple)).numerator > MAX_MULTIPLE:
        _refuse(f"json has multipleOf={multiple}; at most {MAX_MULTIPLE} is allowed")
    for value in part.values():
        _check_parts(value)


def _keys(value: Any) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def _refuse(what: str) -> NoReturn:
    raise RequestError(f"StructuredOutputsParams: {what}")
