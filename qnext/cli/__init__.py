"""The ``qnext`` command: verbs, help, exit codes.

Results go to stdout, news to stderr. Exit codes: 0 done, 1 failed, 2 asked wrongly, 130
interrupted. Heavy imports happen inside the verbs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from qnext import __version__
from qnext.cli import bench, checkpoints, generate, machine, training
from qnext.errors import ConfigError, QnextError, RequestError

app = typer.Typer(
    name="qnext",
    help="Qwen3-Next, the whole system: generate, chat, inspect, train, measure.",
    no_args_is_help=True,
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
    debug: Annotated[bool, typer.Option(help="Show tracebacks and debug logs.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version
    ctx.obj = {"debug": debug}
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("qnext").setLevel(logging.DEBUG if debug else logging.INFO)


for verb in (
    generate.generate,
    generate.chat,
    checkpoints.inspect,
    checkpoints.pull,
    checkpoints.convert,
    training.train,
    training.data,
    bench.bench,
    machine.doctor,
):
    app.command()(verb)


def main() -> None:
    """Run the command line and leave with its exit code."""
    debug = "--debug" in sys.argv
    try:
        app()
    except QnextError as error:
        if debug:
            raise
        typer.echo(f"qnext: {error}", err=True)
        if error.hint:
            typer.echo(f"hint: {error.hint}", err=True)
        sys.exit(2 if isinstance(error, ConfigError | RequestError) else 1)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
