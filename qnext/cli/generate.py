"""``qnext generate``: continue a text on the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli import session
from qnext.errors import RequestError

if TYPE_CHECKING:
    from qnext.engine.structured_outputs import StructuredOutputsParams

SAMPLE = "A transaction is"
"""Shows the model in the box; an Instruct model is better served by ``qnext chat``."""


@session.engine_options
def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; - reads stdin.")] = None,
    model: session.Model = None,
    max_tokens: session.MaxTokens = 200,
    temperature: session.Temperature = None,
    top_p: session.TopP = None,
    top_k: session.TopK = None,
    repetition_penalty: session.Penalty = None,
    max_thinking_tokens: session.MaxThinking = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="File of a JSON schema that the text must have.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="The text must match it as a whole.")] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="One of the texts to choose from; repeat it.")
    ] = None,
    grammar: Annotated[Path | None, typer.Option(help="File of an EBNF grammar.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object instead of text.")
    ] = False,
    *,
    load: session.Loader,
) -> None:
    """Continue a text, streaming. Without arguments: a sample of the model in the box."""
    if prompt == "-":
        prompt = _stdin()
    prompt = SAMPLE if prompt is None else prompt
    form = _form(json_schema, regex, choice, grammar)
    llm = load(model)
    params = session.sampling(
        llm,
        max_tokens,
        temperature,
        top_p,
        top_k,
        repetition_penalty,
        max_thinking_tokens=max_thinking_tokens,
        structured_outputs=form,
    )
    pace = session.Pace(llm)
    if as_json:
        [result] = llm.generate(prompt, params)
        row = {
            "prompt": prompt,
            "text": result.text,
            "token_ids": list(result.token_ids),
            "finish_reason": result.finish_reason,
            "stats": pace.facts(),
        }
        typer.echo(json.dumps(row, ensure_ascii=False))
        return
    stream = llm.stream(prompt, params)
    session.write(prompt)
    for delta in stream:
        session.write(delta.text)
    session.write("\n")
    typer.echo(pace.line(), err=True)


def _form(
    schema: Path | None, regex: str | None, choice: list[str] | None, grammar: Path | None
) -> StructuredOutputsParams | None:
    """The form that the options ask for, checked before a model is loaded."""
    from qnext.engine.structured_outputs import StructuredOutputsParams

    given = {
        "json": None if schema is None else _text(schema),
        "regex": regex,
        "choice": choice or None,
        "grammar": None if grammar is None else _text(grammar),
    }
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return StructuredOutputsParams(**asked) if asked else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: {error}") from error


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text: {error}") from error
