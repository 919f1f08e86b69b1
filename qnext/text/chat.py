"""Messages to a prompt through the checkpoint's own Jinja template, run in a sandbox.

Messages are checked first (messages.py); the sandbox and its limits are in sandbox.py. The spans
of what the assistant wrote come out as well, for the loss mask of fine-tuning.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from qnext.errors import TextError
from qnext.text import sandbox
from qnext.text.messages import check_tools, normalize_messages, plain

OPTIONS = frozenset(
    {
        "add_vision_id",
        "builtin_tools",
        "date_string",
        "documents",
        "enable_thinking",
        "preserve_thinking",
        "reasoning_effort",
        "thinking",
        "thinking_budget",
        "tool_choice",
    }
)
"""Names that may be handed through to a template."""

KINDS = ("instruct", "thinking", "coder")


@dataclass(frozen=True)
class RenderedChat:
    """A prompt and where in it the assistant's own words lie (character offsets, end exclusive)."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()


class ChatTemplate:
    """A chat template, compiled once and rendered many times (also from several threads).

    Args:
        source: the template's text, or several by name ("default", "tool_use", ...).
        special_tokens: texts the template may use by name, e.g. ``{"eos_token": "<|im_end|>"}``.

    Raises:
        TextError: the template is too long or not Jinja.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        *,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        sources = {"default": source} if isinstance(source, str) else dict(source)
        if not sources:
            raise TextError("a chat template without any text")
        self.sources = sources
        self._special_tokens = dict(special_tokens or {})
        self._compiled = {name: _compile(name, text) for name, text in sources.items()}

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, default: str | None = None) -> ChatTemplate:
        """Template of a checkpoint folder.

        Looks for ``chat_template.jinja``, then ``chat_template`` in ``tokenizer_config.json`` (a
        text or a list of ``{"name", "template"}``), then takes our own ``default`` if given.

        Raises:
            TextError: there is none, or it is damaged.
        """
        folder = Path(folder)
        config: Any = {}
        path = folder / "tokenizer_config.json"
        if path.is_file():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise TextError(f"{path} is not JSON: {error}", hint="fetch it again") from error
            if not isinstance(config, dict):
                raise TextError(f"{path} holds {type(config).__name__}, not an object")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {name: _content(config[name]) for name in names if config.get(name)}
        source = config.get("chat_template")
        path = folder / "chat_template.jinja"
        if path.is_file():
            try:
                source = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise TextError(f"{path} is not UTF-8 text: {error}") from error
        if source is None:
            if default is None:
                raise TextError(
                    f"no chat template in {folder}",
                    hint="a base model has none: send plain prompts, or pass a template",
                )
            return default_template(default, special_tokens=tokens)
        if isinstance(source, list):
            try:
                source = {one["name"]: one["template"] for one in source}
            except (TypeError, KeyError) as error:
                raise TextError(f"chat_template in {folder} is a damaged list") from error
        texts = source.values() if isinstance(source, dict) else [source]
        if not all(isinstance(text, str) for text in texts):
            raise TextError(f"chat_template in {folder} is not text")
        return cls(source, special_tokens=tokens)

    def source(self, *, tools: bool = False) -> str:
        """Text of the template that is used with or without tools."""
        return self.sources[self._choose(tools)]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """The prompt; see `render_with_spans`."""
        return self.render_with_spans(messages, tools, add_generation_prompt, **options).text

    def render_with_spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> RenderedChat:
        """Prompt of a conversation and the assistant's spans in it.

        Args:
            messages: OpenAI style messages (`normalize_messages` says what they may hold).
            tools: OpenAI style function definitions, shown to the model in the given order.
            add_generation_prompt: end with the opening of an assistant turn.
            **options: values for the template, names from `OPTIONS`; None counts as not given.

        Raises:
            TextError: a message, tool or option is wrong; the template refuses or breaks a limit.
        """
        unknown = sorted(set(options) - OPTIONS)
        if unknown:
            raise TextError(
                f"unknown chat template option {', '.join(unknown)}",
                hint=f"known are {', '.join(sorted(OPTIONS))}",
            )
        given = {k: plain(v, k) for k, v in options.items() if v is not None}
        checked = check_tools(tools) if tools else None
        context = {
            **self._special_tokens,
            "documents": None,
            **given,
            "messages": normalize_messages(messages),
            "tools": checked,
            "add_generation_prompt": add_generation_prompt,
        }
        return _run(self._compiled[self._choose(bool(checked))], context)

    def _choose(self, tools: bool) -> str:
        if tools and "tool_use" in self.sources:
            return "tool_use"
        return "default" if "default" in self.sources else next(iter(self.sources))


def default_template(kind: str, *, special_tokens: Mapping[str, str] | None = None) -> ChatTemplate:
    """Our own template with Qwen's prompt: "instruct", "thinking" or "coder" (tools as XML).

    Raises:
        TextError: there is no such kind.
    """
    if kind not in KINDS:
        raise TextError(f"no chat template of kind {kind!r}", hint=f"kinds: {', '.join(KINDS)}")
    file = resources.files("qnext.text") / "templates" / f"{kind}.jinja"
    return ChatTemplate(file.read_text(encoding="utf-8"), special_tokens=special_tokens)


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) and "content" in token else token)


def _compile(name: str, text: str) -> Any:
    if len(text) > sandbox.MAX_TEMPLATE_CHARS:
        raise TextError(
            f"chat template {name!r} has {len(text)} characters, "
            f"at most {sandbox.MAX_TEMPLATE_CHARS} are read"
        )
    try:
        return sandbox.Sandbox().from_string(text)
    except (TemplateError, RecursionError, SyntaxError, ValueError) as error:
        raise TextError(f"chat template {name!r} is not valid Jinja: {error}") from error


def _run(template: Any, context: Mapping[str, Any]) -> RenderedChat:
    render = sandbox.Render()
    token = sandbox.current.set(render)
    try:
        return RenderedChat(_collect(template.generate(**context), render), tuple(render.spans))
    except TemplateError as error:
        raise TextError(f"the chat template refused: {error.message or error}") from error
    except (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as e:
        raise TextError(f"the chat template failed: {e}") from e
    except AttributeError as error:
        raise TextError(f"the chat template failed: {error}") from error
    finally:
        sandbox.current.reset(token)


def _collect(pieces: Iterable[str], render: sandbox.Render) -> str:
    parts = []
    for piece in pieces:
        parts.append(piece)
        render.chars += len(piece)
        if render.chars > sandbox.MAX_OUTPUT_CHARS:
            raise TextError(f"the prompt is longer than {sandbox.MAX_OUTPUT_CHARS} characters")
    return "".join(parts)
