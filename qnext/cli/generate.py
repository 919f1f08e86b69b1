"""``qnext generate`` and ``qnext chat``: text on the terminal."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qnext.engine.llm import LLM
    from qnext.engine.outputs import StreamDelta
    from qnext.engine.sampling_params import SamplingParams

Model = Annotated[str | None, typer.Option("--model", "-m", help="Folder or hub id; default: the model in the box.")]  # fmt: skip
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; default: the model's own.")]
TopP = Annotated[float | None, typer.Option(help="Nucleus; default: the model's own.")]
TopK = Annotated[int | None, typer.Option(help="Best k only; default: the model's own.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Drafts = Annotated[str, typer.Option("--num-speculative-tokens", "-k", help="MTP drafts per step: 0..8 or auto.")]  # fmt: skip
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float32, float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda.")]
Offline = Annotated[bool, typer.Option(help="Use only what is downloaded.")]

SAMPLE = "The kernel keeps a list of"


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; - reads stdin.")] = None,
    model: Model = None,
    max_tokens: MaxTokens = 200,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    num_speculative_tokens: Drafts = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    offline: Offline = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Continue a text, streaming."""
    if prompt == "-":
        prompt = sys.stdin.read()
    prompt = prompt if prompt is not None else SAMPLE
    llm = _load(model, num_speculative_tokens, dtype, device, offline)
    params = _params(llm, max_tokens, temperature, top_p, top_k, seed)
    if as_json:
        [result] = llm.generate(prompt, params)
        row = {
            "prompt": prompt, "text": result.text, "token_ids": list(result.token_ids),
            "finish_reason": result.finish_reason, "stats": _stats(llm),
        }  # fmt: skip
        typer.echo(json.dumps(row, ensure_ascii=False))
        return
    sys.stdout.write(prompt)
    for delta in llm.stream(prompt, params):
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    typer.echo(_line(llm), err=True)


def chat(
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    num_speculative_tokens: Drafts = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    offline: Offline = False,
) -> None:
    """Talk with a model; Ctrl-C stops an answer, /help lists commands.

    A base model has no chat template: then it continues the running text instead.
    """
    llm = _load(model, num_speculative_tokens, dtype, device, offline)
    params = _params(llm, max_tokens, temperature, top_p, top_k, seed)
    talk = Conversation(llm, params, system)
    if talk.template is None:
        typer.echo("A base model without a chat template: it continues what you write.", err=True)
    typer.echo("/help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.", err=True)
    _history()
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo("", err=True)
            return
        if text.strip() in ("/quit", "/exit"):
            return
        if text.startswith("/"):
            talk.command(text.strip())
        elif text.strip():
            talk.say(text)


class Conversation:
    """The messages so far, and one answer at a time."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        from qnext.errors import TextError
        from qnext.text import ChatTemplate, parser_for

        self.llm, self.params, self.system = llm, params, system
        self.template: ChatTemplate | None = None
        try:
            self.template = ChatTemplate.from_pretrained(llm.model_path)
            self.format = parser_for(llm.tokenizer, self.template)
        except TextError:
            self.template = None
        self.messages: list[dict[str, Any]] = []
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.text = ""

    def command(self, text: str) -> None:
        """Carry out a line that begins with a slash."""
        if text == "/clear":
            self.clear()
            typer.echo("(forgotten)", err=True)
        elif text == "/context":
            typer.echo(self._meter(), err=True)
        elif text == "/undo":
            del self.messages[-2:]
            typer.echo("(last exchange removed)", err=True)
        else:
            typer.echo("/clear  /undo  /context  /quit", err=True)

    def say(self, text: str) -> None:
        """Send one message and stream the answer; Ctrl-C keeps what has come so far."""
        try:
            if self.template is None:
                self._continue(text)
            else:
                self._answer(text)
        except RequestError as error:
            typer.echo(f"qnext: {error}" + (f" ({error.hint})" if error.hint else ""), err=True)
            return
        typer.echo(f"{self._meter()}  {_line(self.llm)}", err=True)

    def _continue(self, text: str) -> None:
        self.text += text
        for delta in _interruptible(self.llm.stream(self.text, self.params)):
            self.text += delta.text
            sys.stdout.write(delta.text)
            sys.stdout.flush()
        self.text += "\n"
        sys.stdout.write("\n")

    def _answer(self, text: str) -> None:
        from qnext.text import ContentDelta, ReasoningDelta

        self.messages.append({"role": "user", "content": text})
        prompt = self.llm.render_chat(self.messages)
        parser = self.format.start(prompt)
        dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
        content, thinking = "", False

        def show(events: Any) -> None:
            nonlocal content, thinking
            for event in events:
                if isinstance(event, ReasoningDelta):
                    sys.stdout.write(("" if thinking else f"{dim}[thinking] ") + event.text)
                    thinking = True
                elif isinstance(event, ContentDelta):
                    if thinking:
                        sys.stdout.write(f"{plain}\n")
                        thinking = False
                    sys.stdout.write(event.text)
                    content += event.text
                else:
                    sys.stdout.write(f"[call {event.name} {event.arguments}]")
            sys.stdout.flush()

        for delta in _interruptible(self.llm.stream(prompt, self.params)):
            show(parser.push(delta.text))
        show(parser.finish())
        sys.stdout.write(f"{plain if thinking else ''}\n")
        self.messages.append({"role": "assistant", "content": content})

    def _meter(self) -> str:
        assert self.llm.tokenizer is not None
        text = self.text
        if self.template is not None:
            text = self.llm.render_chat(self.messages) if self.messages else ""
        used, room = len(self.llm.tokenizer.encode(text)), self.llm.max_model_len
        return f"[context {used:,} of {room:,} tokens, {used / room:.0%}]"


def _interruptible(stream: Iterator[StreamDelta]) -> Iterator[StreamDelta]:
    """Ctrl-C ends the answer, not the program."""
    try:
        yield from stream
    except KeyboardInterrupt:
        stream.close()  # type: ignore[attr-defined]
        sys.stdout.write(" [stopped]")


def _history() -> None:
    try:
        import readline
    except ImportError:
        return
    readline.set_history_length(1000)


def _load(model: str | None, drafts: str, dtype: str, device: str, offline: bool) -> LLM:
    from qnext.engine.llm import LLM

    started = time.perf_counter()
    count: int | str = int(drafts) if drafts.isdigit() else drafts
    llm = LLM(model, dtype=dtype, device=device, num_speculative_tokens=count, offline=offline)
    seconds = time.perf_counter() - started
    typer.echo(f"{llm.model_path.name} loaded in {seconds:.1f} s", err=True)
    return llm


def _params(
    llm: LLM,
    max_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
) -> SamplingParams:
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    changes = {name: value for name, value in given.items() if value is not None}
    return llm.get_default_sampling_params().replace(max_tokens=max_tokens, **changes)


def _stats(llm: LLM) -> dict[str, Any]:
    s = llm.stats
    rate = s.num_generated_tokens / s.decode_seconds if s.decode_seconds else None
    return {
        "prompt_tokens": s.num_prompt_tokens,
        "generated_tokens": s.num_generated_tokens,
        "decode_tokens_per_s": rate,
        "acceptance_per_position": s.acceptance_per_position,
    }


def _line(llm: LLM) -> str:
    stats = _stats(llm)
    rate = stats["decode_tokens_per_s"]
    text = f"[{rate:.0f} tokens/s" if rate else "["
    if stats["acceptance_per_position"]:
        shares = " ".join(f"{x:.0%}" for x in stats["acceptance_per_position"])
        text += f", drafts accepted {shares}"
    return text + "]"
