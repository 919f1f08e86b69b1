"""What a model says, taken apart while it streams: reasoning, content, tool calls.

Two machines in a row (reasoning, then tool calls); any split of the text gives the same sums.
Which ones are needed follows from the chat template: `parser_for`. Bodies of calls: toolcalls.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qnext.errors import TextError
from qnext.text.chat import ChatTemplate
from qnext.text.detokenize import held_prefix
from qnext.text.tokenizer import Tokenizer
from qnext.text.toolcalls import CoderXmlBody, HermesBody, ToolCallBody

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the text between ``<think>`` and ``</think>``."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """One whole call: place among the calls, function name, arguments (JSON text of an object)."""

    index: int
    name: str
    arguments: str


Event = ReasoningDelta | ContentDelta | ToolCall


@dataclass
class ParsedMessage:
    """All events of one answer, added up."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    @classmethod
    def of(cls, events: Iterable[Event]) -> ParsedMessage:
        """Add up events."""
        found = cls()
        for event in events:
            if isinstance(event, ReasoningDelta):
                found.reasoning += event.text
            elif isinstance(event, ContentDelta):
                found.content += event.text
            else:
                found.tool_calls.append(event)
        return found


class ReasoningParser:
    """Separates reasoning from the rest.

    The newlines that the template puts after ``<think>`` and around ``</think>`` belong to neither.
    Without ``opened`` only a ``<think>`` at the very beginning of the answer starts reasoning.

    Args:
        opened: the prompt has already opened the reasoning.
    """

    def __init__(self, *, opened: bool) -> None:
        self._state: Literal["start", "reasoning", "answer"] = "reasoning" if opened else "start"
        self._held = ""
        self._skip_newlines = True  # at the head of the reasoning, then of the content

    def push(self, text: str) -> tuple[str, str]:
        """New (reasoning, rest) after ``text``."""
        text = self._held + text
        self._held = reasoning = ""
        if self._state == "start":
            head = text.lstrip()
            if head.startswith(THINK):
                self._state, text = "reasoning", head[len(THINK) :]
            elif THINK.startswith(head):
                self._held = text
                return "", ""
            else:  # an answer without reasoning: nothing is taken from it
                self._state, self._skip_newlines = "answer", False
        if self._state == "reasoning":
            thought, found, rest = text.partition(END_THINK)
            if found:
                reasoning = self._headless(thought).rstrip("\n")
                self._state, self._skip_newlines, text = "answer", True, rest
            else:
                keep = held_prefix(text, END_THINK)
                # newlines may belong to the closing tag: they wait for what follows
                shown = text[: len(text) - keep].rstrip("\n")
                self._held = text[len(shown) :]
                return self._headless(shown), ""
        return reasoning, self._headless(text)

    def finish(self) -> tuple[str, str]:
        """The (reasoning, rest) that was held back when the answer ends here."""
        rest, self._held = self._held, ""
        if self._state == "reasoning":
            return self._headless(rest.rstrip("\n")), ""
        return "", rest

    def _headless(self, text: str) -> str:
        if self._skip_newlines:
            text = text.lstrip("\n")
            self._skip_newlines = not text
        return text


class ToolParser:
    """Separates tool calls between ``<tool_call>`` and ``</tool_call>`` from content.

    Newlines before a call and blanks after it are not content. What stands between the tags and is
    no call stays content, tags included, so nothing the model said is lost.
    """

    def __init__(self, body: ToolCallBody) -> None:
        self._body = body
        self._held = ""
        self._in_call = False
        self._scanned = 0  # of the held text, already searched for the closing tag
        self._after_call = False
        self._count = 0

    def push(self, text: str) -> list[Event]:
        """Events that are certain after ``text``."""
        self._held += text
        return list(self._events())

    def finish(self) -> list[Event]:
        """The rest: a call that only lacks its closing tag counts, anything else is content."""
        rest, self._held = self._held, ""
        if self._in_call:
            self._in_call = False
            call = self._body.read(rest[len(CALL) + self._lead(rest) :])
            if call is not None:
                return [self._called(*call)]
        return self._content(rest)

    def _events(self) -> Iterator[Event]:
        while True:
            if not self._in_call:
                at = self._held.find(CALL)
                if at < 0:
                    keep = held_prefix(self._held, CALL)
                    shown = self._held[: len(self._held) - keep].rstrip("\n")
                    self._held = self._held[len(shown) :]
                    yield from self._content(shown)
                    return
                shown = self._held[:at].rstrip("\n")
                yield from self._content(shown)
                self._held = self._held[len(shown) :]  # newlines first: they may yet be content
                self._in_call, self._scanned = True, 0
            start = self._lead(self._held) + len(CALL)
            at = self._held.find(END_CALL, max(start, self._scanned))
            if at < 0:
                self._scanned = max(start, len(self._held) - len(END_CALL) + 1)
                return
            body, end = self._held[start:at], at + len(END_CALL)
            call = self._body.read(body) if self._body.may_end(body) else None
            if call is not None:
                yield self._called(*call)
            elif not self._body.may_end(body):
                self._scanned = end  # the tag is inside a value
                continue
            else:
                yield from self._content(self._held[:end])
            self._held, self._in_call = self._held[end:], False

    def _lead(self, held: str) -> int:
        return len(held) - len(held.lstrip("\n"))

    def _content(self, text: str) -> list[Event]:
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        return [ContentDelta(text)] if text else []

    def _called(self, name: str, arguments: str) -> ToolCall:
        self._after_call = True
        self._count += 1
        return ToolCall(self._count - 1, name, arguments)


class Parser:
    """One answer, from pieces of text to events."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    def push(self, text: str) -> list[Event]:
        """Events that are certain after ``text``."""
        thought, rest = self._reasoning.push(text) if self._reasoning else ("", text)
        return self._joined(thought, rest)

    def finish(self) -> list[Event]:
        """Events of what was held back; call it once, at the end of the answer."""
        thought, rest = self._reasoning.finish() if self._reasoning else ("", "")
        return [*self._joined(thought, rest), *(self._tools.finish() if self._tools else ())]

    def parse(self, text: str) -> ParsedMessage:
        """A whole answer at once."""
        return ParsedMessage.of([*self.push(text), *self.finish()])

    def _joined(self, thought: str, rest: str) -> list[Event]:
        events: list[Event] = [ReasoningDelta(thought)] if thought else []
        if rest:
            events += self._tools.push(rest) if self._tools else [ContentDelta(rest)]
        return events


@dataclass(frozen=True)
class ParserFormat:
    """How a model's answers are written; `start` gives the parser of one answer."""

    reasoning: bool = False
    tools: Literal["hermes", "coder_xml"] | None = None

    def start(self, prompt: str = "", tools: Sequence[Mapping[str, Any]] | None = None) -> Parser:
        """Parser for the answer to ``prompt``; calls are looked for only if ``tools`` are given."""
        opened = prompt.rstrip().endswith(THINK)
        reasoning = ReasoningParser(opened=opened) if self.reasoning or opened else None
        if not tools or self.tools is None:
            return Parser(reasoning, None)
        body = HermesBody() if self.tools == "hermes" else CoderXmlBody(tools)
        return Parser(reasoning, ToolParser(body))


def parser_for(tokenizer: Tokenizer | None, template: ChatTemplate) -> ParserFormat:
    """The format that a checkpoint's template teaches its model.

    Raises:
        TextError: the tokenizer drops a tag that the parser needs (flag special=true).
    """
    source = template.source(tools=True)
    tools: Literal["hermes", "coder_xml"] | None = None
    if CALL in source:
        tools = "coder_xml" if "<function=" in source else "hermes"
    found = ParserFormat(reasoning=END_THINK in source, tools=tools)
    tags = [THINK, END_THINK] if found.reasoning else []
    tags += [CALL, END_CALL] if tools else []
    for tag in tags:
        if tokenizer is not None and tokenizer.token_to_id(tag) in tokenizer.special_ids:
            raise TextError(
                f"the tokenizer marks {tag} as special, so it never reaches the text",
                hint='set "special": false for it in tokenizer.json',
            )
    return found
