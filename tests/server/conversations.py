"""What the tests of this room say, and what a scripted model answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

MODEL = "qnext-small"
HI = [{"role": "user", "content": "Weather in Rome and Paris?"}]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"$ref": "#/$defs/City"},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"City": {"enum": ["Paris", "Rome"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


class Answer(BaseModel):
    """A form for the model's answer."""

    color: Literal["red", "green"]
    count: int = Field(ge=0, le=99)
    notes: list[Literal["a", "b"]] = Field(max_length=2)


def call(city: str) -> str:
    return f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


THOUGHT = "Two cities,\ntwo calls."
BOTH = f"{THOUGHT}\n</think>\n\nI look it up.\n{call('Rome')}\n{call('Paris')}"
