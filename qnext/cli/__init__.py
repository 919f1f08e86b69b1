"""The ``qnext`` command: verbs, help, exit codes.

Results go to stdout, news to stderr. Exit codes: 0 done, 1 failed, 2 asked wrongly, 130
interrupted. Heavy imports happen inside the verbs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, Any

import typer

from qnext import __version__
from qnext.cli import (
    bench,
    chat,
    checkpoints,
    evaluate,
    generate,
    machine,
    plan,
    quantize,
    serve,
    training,
)
from qnext.errors import ConfigError, QnextError, RequestError

app = typer.Typer(
    name="qnext",
    help="Qwen3-Next, the whole system: generate, chat, inspect, train, measure.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logger = logging.getLogger("qnext")
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    # What a pull does is news to whoever waits for it, whichever verb asked for the model.
    logging.getLogger("qnext.hub").setLevel(logging.DEBUG if debug else logging.INFO)


for verb in (
    generate.generate,
    chat.chat,
    serve.serve,
    checkpoints.inspect,
    plan.plan,
    checkpoints.pull,
    checkpoints.convert,
    quantize.quantize,
    training.train,
    bench.bench,
    machine.doctor,
):
    app.command()(verb)
app.command(name="eval")(evaluate.evaluate)
app.add_typer(training.data)


def main() -> None:
    """Run the command line and leave with its exit code."""
    debug = "--debug" in sys.argv[1:2]
    code: Any = 0
    try:
        code = app(standalone_mode=False, prog_name="qnext")
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if debug and not isinstance(error, BrokenPipeError):
            raise
        code = _report(error)
    if code == 130:
        typer.echo("\ninterrupted", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> int:
    """Say on stderr what went wrong and what to do; the exit code."""
    if isinstance(error, BrokenPipeError):
        # The reader of our output went away; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    text, hint, code = str(error), getattr(error, "hint", None), 1
    if isinstance(error, QnextError):
        code = 2 if isinstance(error, ConfigError | RequestError) else 1
    elif hasattr(error, "format_message"):  # Typer's own: an unknown verb, option or value
        text, code = error.format_message(), 2
        ctx = getattr(error, "ctx", None)
        hint = f"see `{ctx.command_path if ctx else 'qnext'} --help`"
    elif isinstance(error, ModuleNotFoundError) and error.name:
        name = error.name.partition(".")[0]
        extra = machine.OPTIONAL.get(name)
        text = f"this needs the package {name}, which is not installed"
        hint = f"pip install 'qnext[{extra}]'" if extra else f"pip install {name}"
    elif not isinstance(error, OSError):
        text = f"{type(error).__name__}: {error}"
        hint = "`qnext --debug ...` shows where; if memory is not the cause, this is a bug"
    typer.echo(f"qnext: {text}", err=True)
    if hint:
        typer.echo(f"hint: {hint}", err=True)
    return code
