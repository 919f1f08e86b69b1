"""The Jinja sandbox of chat templates: they come from the network, so they are not trusted.

Like the environment of transformers (blocks trimmed, `tojson`, `raise_exception`, `strftime_now`,
`{% generation %}`), with every loop turn and macro call counted and every growing string measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sized
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE_CHARS = 256 * 1024
MAX_OUTPUT_CHARS = 32 * 1024 * 1024
MAX_STEPS = 300_000
"""Loop turns plus macro calls of one rendering; a `range` may span 100,000 (Jinja's limit)."""

_PADDING = frozenset({"center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"})
_MAX_INT_BITS = 4096


@dataclass
class Render:
    """What one rendering has used so far, and the assistant's spans it met."""

    steps: int = 0
    chars: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)


current: ContextVar[Render] = ContextVar("chat_template_render")


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant itself has written."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        """Turn the block into a call that notes where its text lies."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        render = current.get()
        render.spans.append((render.chars, render.chars + len(text)))
        return text


class Sandbox(ImmutableSandboxedEnvironment):
    """Environment for one chat template; not for anything else."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing of the template is evaluated before its limits are set
            extensions=[Generation, loopcontrols],
        )
        self.filters["tojson"] = _tojson
        for name in ("center", "format", "urlize", "wordwrap"):
            self.filters.pop(name)
        self.globals.pop("lipsum")
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Count().visit(tree)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """No private or internal names, no method that pads a text to any width."""
        if isinstance(obj, str) and attr in _PADDING:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No sandboxed `str.format` either: a width in it may be any number."""
        return None

    def step(self) -> str:
        """Count one loop turn or macro call."""
        render = current.get()
        render.steps += 1
        if render.steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} loop turns")
        return ""

    def joined(self, *parts: Any) -> str:
        """The `~` operator, measured."""
        return measured("".join(map(str, parts)))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The growing operators, refused where the result could be huge."""
        if operator == "%" and isinstance(left, str):
            raise SecurityError("text formatting with % is not allowed")
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (max(right, 1) if operator == "**" else 1)
            if bits + right.bit_length() > _MAX_INT_BITS:
                raise SecurityError("a number is too large")
        elif operator == "*":
            for sized, times in ((left, right), (right, left)):
                if isinstance(sized, Sized) and isinstance(times, int):
                    _check(len(sized) * times)
        elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            _check(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Any call, with a text `replace` or `join` measured before and every result after."""
        if getattr(obj, "__func__", None) is Sandbox.step:
            return obj()
        name, text = getattr(obj, "__name__", ""), getattr(obj, "__self__", None)
        if isinstance(text, str) and name == "replace" and len(args) > 1:
            _check(len(text) + (len(text) + 1) * len(str(args[1])))
        return measured(super().call(context, obj, *args, **kwargs))


def measured(value: Any) -> Any:
    """The value itself, unless it is a text longer than any output may be."""
    if isinstance(value, str):
        _check(len(value))
    return value


def _check(size: int) -> None:
    if size > MAX_OUTPUT_CHARS:
        raise SecurityError(f"a text would be longer than {MAX_OUTPUT_CHARS} characters")


class _Count(NodeTransformer):
    """Puts a `step` call into every loop and macro, and measures every `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _environment_call("joined", node.nodes, node.lineno)

    def _counted(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        step = nodes.ExprStmt(_environment_call("step", [], node.lineno), lineno=node.lineno)
        node.body.insert(0, step)
        return node


def _environment_call(name: str, args: list[nodes.Expr], line: int) -> nodes.Call:
    method = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(method, args, [], None, None, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int | str) and not (isinstance(indent, int) and indent <= 16):
        raise TemplateError(f"tojson: indent is {indent!r}; at most 16")
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return str(measured(text))


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 100 or re.search(r"%[-_0^#+]*\d", form):  # a width such as %999999999d
        raise SecurityError(f"strftime_now: {form[:100]!r} is not allowed")
    return datetime.now().astimezone().strftime(form)
