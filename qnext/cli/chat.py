"""``qnext chat``: a conversation on the terminal.

Answers go to stdout, everything about them to stderr. The line editor keeps what was typed in
this session (arrow keys); nothing is written to a file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli import session
from qnext.errors import RequestError, TextError

if TYPE_CHECKING:
    from qnext.engine.llm import LLM
    from qnext.engine.outputs import StreamDelta
    from qnext.engine.sampling_params import SamplingParams

COMMANDS = {
    "/clear": "forget the conversation",
    "/undo": "take the last exchange back",
    "/context": "say how full the context is",
    "/quit": "leave, as Ctrl-D",
}


@session.engine_options
def chat(
    model: session.Model = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: session.MaxTokens = 1024,
    temperature: session.Temperature = None,
    top_p: session.TopP = None,
    top_k: session.TopK = None,
    repetition_penalty: session.Penalty = None,
    max_thinking_tokens: session.MaxThinking = None,
    *,
    load: session.Loader,
) -> None:
    """Talk with a model; Ctrl-C stops an answer, /help lists commands.

    A base model has no chat template: then it continues the running text instead.
    """
    llm = load(model)
    params = session.sampling(
        llm,
        max_tokens,
        temperature,
        top_p,
        top_k,
        repetition_penalty,
        max_thinking_tokens=max_thinking_tokens,
    )
    talk = Conversation(llm, params, system)
    if not talk.has_template:
        typer.echo("A base model without a chat template: it continues what you write.", err=True)
    typer.echo("/help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.", err=True)
    _line_editor()
    while True:
        try:
            text = _read()
        except EOFError:
            typer.echo("", err=True)
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            typer.echo("\n(Ctrl-D leaves)", err=True)
            continue
        word = text.strip()
        if word == "/quit":
            return
        if word.startswith("/") and (word in COMMANDS or " " not in word):
            talk.command(word)
        elif word:
            talk.say(text)


class Conversation:
    """The exchanges so far, and one answer at a time.

    Args:
        llm: the model.
        params: how answers are sampled.
        system: the system message; a base model simply begins with it.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        from qnext.text import ChatTemplate, parser_for

        self.llm, self.params, self.system = llm, params, system
        self.exchanges: list[tuple[str, str]] = []
        assert llm.tokenizer is not None
        try:
            template = ChatTemplate.from_pretrained(llm.model_path)
        except TextError as error:
            if "no chat template" not in str(error):
                raise
            self.has_template = False
        else:
            self.has_template = True
            self.format = parser_for(llm.tokenizer, template)

    def command(self, word: str) -> None:
        """Carry out a line that begins with a slash."""
        if word == "/clear":
            self.exchanges.clear()
            typer.echo("(forgotten)", err=True)
        elif word == "/undo":
            typer.echo("(taken back)" if self.exchanges else "(nothing to take back)", err=True)
            del self.exchanges[-1:]
        elif word == "/context":
            typer.echo(self.meter(), err=True)
        else:
            for name, meaning in COMMANDS.items():
                typer.echo(f"{name:9} {meaning}", err=True)
            typer.echo("A line that ends in \\ goes on in the next one.", err=True)

    def say(self, text: str) -> None:
        """Send one message and stream the answer; Ctrl-C keeps what has come so far."""
        pace = session.Pace(self.llm)
        try:
            prompt = self.prompt(text)
            answer = self._answer(prompt) if self.has_template else self._continue(prompt)
        except (RequestError, TextError) as error:
            typer.echo(f"qnext: {error}", err=True)
            if error.hint:
                typer.echo(f"hint: {error.hint}", err=True)
            return
        self.exchanges.append((text, answer))
        typer.echo(f"{self.meter()} {pace.line()}", err=True)

    def prompt(self, new: str | None = None) -> str:
        """The text the model sees, with a new message at its end if there is one."""
        if not self.has_template:
            before = "".join(f"{said}{answer}\n" for said, answer in self.exchanges)
            return (f"{self.system}\n\n" if self.system else "") + before + (new or "")
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for said, answer in self.exchanges:
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": answer})
        if new is not None:
            messages.append({"role": "user", "content": new})
        if not self.exchanges and new is None:
            return ""
        return self.llm.render_chat(messages, add_generation_prompt=new is not None)

    def meter(self) -> str:
        """How full the context is."""
        assert self.llm.tokenizer is not None
        used, room = len(self.llm.tokenizer.encode(self.prompt())), self.llm.max_model_len
        return f"[context {used:,} of {room:,} tokens, {used / room:.0%}]"

    def _continue(self, prompt: str) -> str:
        answer = ""
        with _stoppable(self.llm.stream(prompt, self.params)) as stream:
            for delta in stream:
                answer += delta.text
                session.write(delta.text)
        session.write("\n")
        return answer

    def _answer(self, prompt: str) -> str:
        """Stream an answer; the thinking is shown dim and is not kept in the conversation."""
        from qnext.text import ContentDelta, ReasoningDelta

        parser = self.format.start(prompt)
        dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
        content, thinking = "", False

        def show(events: Any) -> None:
            nonlocal content, thinking
            for event in events:
                if isinstance(event, ReasoningDelta):
                    session.write(("" if thinking else f"{dim}[thinking] ") + event.text)
                    thinking = True
                    continue
                if thinking:
                    session.write(f"{plain}\n[answer] ")
                    thinking = False
                if isinstance(event, ContentDelta):
                    session.write(event.text)
                    content += event.text
                else:
                    session.write(f"[call {event.name} {event.arguments}]")

        with _stoppable(self.llm.stream(prompt, self.params)) as stream:
            for delta in stream:
                show(parser.push(delta.text))
        show(parser.finish())
        session.write(f"{plain if thinking else ''}\n")
        return content


@contextmanager
def _stoppable(stream: Iterator[StreamDelta]) -> Iterator[Iterator[StreamDelta]]:
    """Ctrl-C anywhere in this block ends the answer, not the program."""
    try:
        yield stream
    except KeyboardInterrupt:
        session.write(" [stopped]")
    finally:
        stream.close()  # type: ignore[attr-defined]


def _line_editor() -> None:
    """With readline imported, ``input`` edits lines and keeps their history in memory."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return


def _read() -> str:
    """One message: a line, or several that end in a backslash."""
    asks = sys.stdin.isatty()
    text = input("> " if asks else "")
    while text.endswith("\\"):
        text = text[:-1] + "\n" + input(". " if asks else "")
    return text
