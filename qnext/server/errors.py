"""Every failure as a status and an error body in OpenAI's words: one table.

What a client reads never holds a path or a traceback: our own messages about a request speak of
the request, and everything unforeseen is one sentence with the id under which the log has it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from qnext.errors import EngineError, QnextError, RequestError, TextError

log = logging.getLogger(__name__)

GONE = 499
"""Status in the log of a request whose client left; nobody reads it."""


class Refusal(RequestError):
    """An answer other than what was asked for.

    Args:
        message: what is wrong, for the client.
        status: HTTP status.
        param: the field that is wrong.
        code: OpenAI's short name of the failure.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after


class Row(NamedTuple):
    """How one kind of exception is told."""

    kind: type[BaseException]
    status: int
    code: str | None
    says: str | None
    """In place of the exception's own words."""


TABLE = (
    Row(RequestError, 400, None, None),
    Row(TextError, 400, None, None),
    Row(EngineError, 503, "engine_error", "the engine could not go on with this request"),
    Row(TimeoutError, 504, "timeout", "the request took longer than this server allows"),
    Row(Exception, 500, "internal_error", "an internal error; the server's log has it"),
)
"""The first row that fits counts."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


def refusal_of(error: BaseException) -> Refusal:
    """Any exception as what the client is told."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):
        return Refusal(str(error.detail), error.status_code)
    row = next((row for row in TABLE if isinstance(error, row.kind)), TABLE[-1])
    if row.status >= 500:
        log.error("a request failed: %s", type(error).__name__, exc_info=error)
    message = row.says or str(error)
    hint = getattr(error, "hint", None)
    if row.says is None and hint:
        message = f"{message} ({hint})"
    retry = 1 if row.status == 503 else None
    return Refusal(message, row.status, code=row.code, retry_after=retry)


def error_body(refusal: Refusal, path: str = "") -> dict[str, Any]:
    """OpenAI's error object; Anthropic's for their endpoint."""
    kind = _TYPES.get(refusal.status)
    if kind is None:
        kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    if path.startswith("/v1/messages"):
        kind = {"server_error": "api_error"}.get(kind, kind)
        return {"type": "error", "error": {"type": kind, "message": str(refusal)}}
    return {
        "error": {
            "message": str(refusal),
            "type": kind,
            "param": refusal.param,
            "code": refusal.code,
        }
    }


def to_json(content: Any) -> bytes:
    """UTF-8 JSON; a lone surrogate, which a client may send, becomes a question mark."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", errors="replace")


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON answer."""
    return Response(to_json(content), status, headers, "application/json")


def error_response(error: BaseException, path: str = "") -> Response:
    """The answer to a request that failed."""
    refusal = refusal_of(error)
    headers = {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(refusal.retry_after)
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, HTTPException) and error.headers:
        headers |= dict(error.headers)
    return json_response(error_body(refusal, path), refusal.status, headers)


async def handle(request: Request, error: Exception) -> Response:
    """FastAPI's door to ``error_response``."""
    return error_response(error, request.url.path)


async def handle_validation(request: Request, error: Any) -> Response:
    """What pydantic found wrong with a body, the first of it, without the body's contents."""
    return error_response(validation_refusal(error.errors()), request.url.path)


def validation_refusal(errors: Iterable[Mapping[str, Any]]) -> Refusal:
    """The first error that says most: one about an unknown or refused field goes first."""
    found = sorted(errors, key=lambda one: one["type"] not in ("extra_forbidden", "refused"))[0]
    loc = [str(part) for part in found["loc"] if part != "body"]
    param, message = ".".join(loc) or None, str(found["msg"])
    if found["type"] == "refused":
        param, message = found["ctx"]["field"], str(found["ctx"]["reason"])
    elif found["type"] == "extra_forbidden":
        message = "no such field"
    elif found["type"] == "json_invalid":
        param, message = None, "the body is not JSON"
    elif not loc:
        message = message.removeprefix("Value error, ")
        if found["type"] in ("model_attributes_type", "missing"):
            message = "the body must be a JSON object, sent as application/json"
    return Refusal(f"{param}: {message}" if param else message, param=param)


HANDLED = (QnextError, HTTPException, TimeoutError, Exception)
