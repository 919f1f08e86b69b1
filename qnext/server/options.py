"""ServerOptions: addresses, keys and limits of one server."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from qnext.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What the operator decides.

    Attributes:
        host: address to listen on.
        port: TCP port, 0 for any free one.
        model_name: what clients call the model; None for the folder's name.
        chat_template: text of a template in place of the checkpoint's own.
        key_digests: SHA-256 digests of the API keys; none means that everyone may ask.
        allowed_hosts: names in the Host header beside the loopback ones; "*" for any.
        allowed_origins: origins of web pages that may call (CORS).
        max_queue: sequences that may wait beyond those that run.
        max_body_bytes: largest request body.
        max_n: most completions of a prompt.
        max_prompts: most prompts of a request.
        max_logprobs: most alternatives reported per token.
        max_output_tokens: most tokens of an answer; None for what fits into the context.
        max_seconds: longest time that a request may take, waiting included.
        body_seconds: longest time that a body may take to arrive.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    chat_template: str | None = None
    key_digests: tuple[bytes, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_queue: int = 256
    max_body_bytes: int = 8 << 20
    max_n: int = 16
    max_prompts: int = 64
    max_logprobs: int = 20
    max_output_tokens: int | None = None
    max_seconds: float = 3600.0
    body_seconds: float = 60.0

    @property
    def hosts(self) -> frozenset[str] | None:
        """Host names that a request may address; None for any."""
        if "*" in self.allowed_hosts or (self.host not in LOOPBACK and not self.allowed_hosts):
            return None
        return frozenset((*LOOPBACK, self.host, *self.allowed_hosts))


def key_digest(key: str) -> bytes:
    """The digest of one key, which is given plain or as ``sha256:HEX``.

    Raises:
        ConfigError: it is empty, or no digest.
    """
    key = key.strip()
    if key.startswith("sha256:"):
        try:
            digest = bytes.fromhex(key.removeprefix("sha256:"))
        except ValueError:
            digest = b""
        if len(digest) != 32:
            raise ConfigError("an API key beginning with sha256: needs 64 hexadecimal digits")
        return digest
    if not key:
        raise ConfigError("an API key is empty")
    return hashlib.sha256(key.encode()).digest()


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The digests of a file with one key per line; blank lines and lines after # are skipped.

    Raises:
        ConfigError: it cannot be read or holds no key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key file {path} cannot be read: {error}") from error
    keys = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"the key file {path} holds no key", hint="one key per line")
    return tuple(key_digest(key) for key in keys)
