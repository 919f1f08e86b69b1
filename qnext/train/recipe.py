"""Strict TOML files: read with overrides, checked against a pydantic model, written back."""

from __future__ import annotations

import difflib
import json
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qnext.errors import ConfigError

_Model = TypeVar("_Model", bound=BaseModel)


def read_recipe(cls: type[_Model], path: Path, overrides: list[str]) -> _Model:
    """Read a recipe and apply ``section.key=value`` overrides.

    Raises:
        ConfigError: no such file, not TOML, an unknown or missing key, a bad value.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"recipe {path} does not exist") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from error
    for item in overrides:
        _override(data, item)
    try:
        return cls(**data)
    except ValidationError as error:
        raise ConfigError(f"recipe {path}: {_explain(error, cls)}") from error


def write_recipe(config: BaseModel) -> str:
    """A config as TOML; reading it gives the same config."""
    data = config.model_dump(exclude_none=True)
    lines = [f"{k} = {_toml(v)}" for k, v in data.items() if not isinstance(v, dict)]
    for name, table in data.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]"]
            lines += [f"{k} = {_toml(v)}" for k, v in table.items() if v is not None]
    return "\n".join(lines) + "\n"


def _override(data: dict[str, Any], item: str) -> None:
    path, equals, text = item.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {item!r} is not of the form key.sub=value")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override {item!r}: {key} is not a section")
    data[keys[-1]] = value


def _explain(error: ValidationError, cls: type[BaseModel]) -> str:
    parts = []
    for item in error.errors():
        name = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            owner = _owner(cls, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), owner.model_fields, 1)
            parts.append(f"unknown key {name}" + (f" (did you mean {near[0]}?)" if near else ""))
        elif item["type"] == "missing":
            parts.append(f"{name} is missing")
        elif item["type"] == "value_error":
            parts.append(f"{name}: {item['msg'].removeprefix('Value error, ')}".lstrip(": "))
        else:
            parts.append(f"{name} = {item['input']!r}: {item['msg']}")
    return "; ".join(parts)


def _owner(cls: type[BaseModel], place: tuple[int | str, ...]) -> type[BaseModel]:
    """The section that a place in the recipe belongs to."""
    for key in place:
        if isinstance(key, int):
            continue
        kind = cls.model_fields[key].annotation
        candidates = [kind, *typing.get_args(kind)]
        sections = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not sections:
            break
        cls = sections[0]
    return cls


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        items = ", ".join(f"{k} = {_toml(v)}" for k, v in value.items() if v is not None)
        return "{ " + items + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
