"""What pydantic found wrong with a request's parameters, as one sentence and a hint."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import BaseModel, ValidationError

from qnext.errors import RequestError


def nearest_hint(name: str, names: Iterable[str]) -> str:
    """A hint that names the known option nearest to ``name``, or all of them."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "known names: " + ", ".join(known)


def request_error(error: ValidationError, model: type[BaseModel]) -> RequestError:
    """The first problem that pydantic found, as one sentence and a hint."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        hint = nearest_hint(where, model.model_fields)
        return RequestError(f"{model.__name__} has no parameter {where!r}", hint=hint)
    if not where:
        return RequestError(f"{model.__name__}: {first['msg'].removeprefix('Value error, ')}")
    said = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    said = said.replace("a valid tuple", "a list")
    return RequestError(
        f"{model.__name__}: {where}={_short(first['input'])} must be {said}",
        hint=_allowed(str(first["loc"][0]), model),
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _allowed(name: str, model: type[BaseModel]) -> str | None:
    """The allowed range of a parameter, from its bounds."""
    bounds = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [
        f"{name} {sign} {getattr(limit, bound)}"
        for limit in model.model_fields[name].metadata
        for bound, sign in bounds.items()
        if hasattr(limit, bound)
    ]
    return "allowed: " + " and ".join(found) if found else None
