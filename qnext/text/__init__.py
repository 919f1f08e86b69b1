"""The words: tokenizer, chat template, detokenizer, and parsers of what a model says.

This room knows no torch and no model. Read tokenizer.py, then chat.py, detokenize.py and parse.py.
"""

from __future__ import annotations

from qnext.text.chat import ChatTemplate, RenderedChat, default_template
from qnext.text.detokenize import IncrementalDetokenizer, StopChecker
from qnext.text.messages import normalize_messages
from qnext.text.parse import (
    ContentDelta,
    ParsedMessage,
    Parser,
    ParserFormat,
    ReasoningDelta,
    ToolCall,
    parser_for,
)
from qnext.text.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "ContentDelta",
    "IncrementalDetokenizer",
    "ParsedMessage",
    "Parser",
    "ParserFormat",
    "ReasoningDelta",
    "RenderedChat",
    "StopChecker",
    "Tokenizer",
    "ToolCall",
    "default_template",
    "normalize_messages",
    "parser_for",
]
