"""``qnext serve``: the model behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated

import typer

from qnext.cli import session
from qnext.errors import ConfigError


@session.engine_options
def serve(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id; default: the model in the box.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port; 0 takes any free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="QNEXT_API_KEY",
            help="Key that clients must send, plain or sha256:HEX; repeat it for several.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with one such key per line.")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model; default: the folder's name.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="File of a chat template, in place of the model's own.")
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Sequences that may wait; more get status 429.")
    ] = 256,
    max_output_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of an answer; default: what fits.")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Largest request body.")] = 8 << 20,
    max_n: Annotated[int, typer.Option(min=1, help="Most completions of a prompt.")] = 16,
    max_seconds: Annotated[
        float, typer.Option(min=0.1, help="Longest time of a request, waiting included.")
    ] = 3600.0,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Origin of web pages that may call; repeat it.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Host header that is answered beside loopback; repeat it, * for any."),
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Log requests: path, status, time, no contents.")
    ] = False,
    *,
    load: session.Loader,
) -> None:
    """Serve an OpenAI-compatible API; the first SIGTERM or Ctrl-C drains, a second one stops."""
    from qnext.server import ServerOptions, Service
    from qnext.server.lifecycle import serve as run
    from qnext.server.options import LOOPBACK, key_digest, read_keys

    digests = [key_digest(key) for key in api_key or ()]
    if api_key_file is not None:
        digests += read_keys(api_key_file)
    options = ServerOptions(
        host=host,
        port=port,
        model_name=served_model_name,
        chat_template=None if chat_template is None else _text(chat_template),
        key_digests=tuple(digests),
        allowed_hosts=tuple(allowed_host or ()),
        allowed_origins=tuple(allow_origin or ()),
        max_queue=max_queue,
        max_output_tokens=max_output_tokens,
        max_body_bytes=max_body_bytes,
        max_n=max_n,
        max_seconds=max_seconds,
    )
    if access_log:
        logging.getLogger("qnext.server").setLevel(logging.INFO)
    if host not in LOOPBACK and not digests:
        typer.echo("warning: anyone who reaches this address may use it; see --api-key", err=True)
    asyncio.run(
        run(Service(options), lambda: load(model), lambda text: typer.echo(f"[{text}]", err=True))
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
