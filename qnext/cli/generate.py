"""``qnext generate``: continue a text on the terminal."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from qnext.cli import session
from qnext.errors import RequestError

SAMPLE = "A transaction is"
"""Shows the model in the box; an Instruct model is better served by ``qnext chat``."""


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; - reads stdin.")] = None,
    model: session.Model = None,
    max_tokens: session.MaxTokens = 200,
    temperature: session.Temperature = None,
    top_p: session.TopP = None,
    top_k: session.TopK = None,
    repetition_penalty: session.Penalty = None,
    seed: session.Seed = 0,
    num_speculative_tokens: session.Drafts = "auto",
    dtype: session.Dtype = "auto",
    device: session.Device = "auto",
    deterministic: session.Deterministic = False,
    revision: session.Revision = None,
    offline: session.Offline = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object instead of text.")
    ] = False,
) -> None:
    """Continue a text, streaming. Without arguments: a sample of the model in the box."""
    if prompt == "-":
        prompt = _stdin()
    prompt = SAMPLE if prompt is None else prompt
    llm = session.load(
        model,
        drafts=num_speculative_tokens,
        dtype=dtype,
        device=device,
        seed=seed,
        revision=revision,
        offline=offline,
        deterministic=deterministic,
    )
    params = session.sampling(llm, max_tokens, temperature, top_p, top_k, repetition_penalty)
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


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text: {error}") from error
