"""Random JSON schemas whose texts end, and the check of a text against one."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema

WORDS = ("name", "age", "Größe", "kind of", "x", "漢字", 'quo"te', "tags", "on")


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema of bounded texts, from every keyword that we promise."""
    if depth == 2 and rng.random() < 0.2:  # references start at the root
        part = random_schema(rng, 1)
        listed = {"type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 2}
        return {"$defs": {"part": part}, **rng.choice([listed, {"$ref": "#/$defs/part"}])}
    kinds = ["string", "integer", "number", "boolean", "enum", "const", "format", "pattern"]
    if depth:
        kinds += ["object", "object", "array", "anyOf"]
    kind = rng.choice(kinds)
    if kind == "string":
        low = rng.randrange(3)
        return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(1, 9)}
    if kind == "integer":
        low = rng.randrange(-200, 200)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(300)}
    if kind == "number":
        low = rng.randrange(-20, 20)
        return {"type": "number", "minimum": low, "maximum": low + rng.randrange(1, 30)}
    if kind == "boolean":
        return {"type": rng.choice(["boolean", "null", ["boolean", "null"]])}
    if kind == "enum":
        return {"enum": rng.sample(["a", "bb", "ü", 1, -2.5, True, None, "a\nb", '"'], 4)}
    if kind == "const":
        return {"const": rng.choice(["fixed", 7, {"k": [1, 2]}, None])}
    if kind == "format":
        return {"type": "string", "format": rng.choice(["date", "time", "ipv4", "uuid"])}
    if kind == "pattern":
        return {
            "type": "string",
            "pattern": rng.choice([r"^[a-f]{2,6}$", r"^\d{3}-\d{2}$", "^é{1,5}x$"]),
        }
    if kind == "array":
        low = rng.randrange(3)
        items = random_schema(rng, depth - 1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1), random_schema(rng, depth - 1)]}
    names = rng.sample(WORDS, rng.randrange(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth - 1) for name in names},
        "required": names[: rng.randrange(len(names) + 1)],
        "additionalProperties": False,
    }


def check_json(text: str, schema: dict[str, Any]) -> None:
    """Fails unless ``text`` is JSON of this schema."""
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
