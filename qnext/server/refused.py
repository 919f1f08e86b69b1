"""Fields of the OpenAI API that this server does not serve, each with the reason.

A field may come with a value that changes nothing (what clients send by default); any other value
is refused. Fields that neither stand here nor in schema.py are unknown and refused as such.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Refused(NamedTuple):
    """Why, and the values that are as good as leaving the field out (None always is)."""

    reason: str
    neutral: tuple[Any, ...] = ()


_STORE = "nothing is stored on this server"
_TEXT = "the model reads and writes text only"
_FUNCTIONS = "deprecated in the OpenAI API; use tools and tool_choice"
_CACHE = "the prefix cache is automatic and has no settings per request"
_MODERATION = "this server does not moderate"
_FAST = "there is one service tier"

COMMON = {
    "service_tier": Refused(_FAST, ("auto", "default")),
    "metadata": Refused(_STORE, ({},)),
    "store": Refused(_STORE, (False,)),
    "moderation": Refused(_MODERATION),
    "prompt_cache_options": Refused(_CACHE),
    "prompt_cache_retention": Refused(_CACHE, ("in_memory", "in-memory")),
    "priority": Refused("requests are ordered by the server"),
}

CHAT = {
    **COMMON,
    "audio": Refused(_TEXT),
    "modalities": Refused(_TEXT, (["text"],)),
    "functions": Refused(_FUNCTIONS),
    "function_call": Refused(_FUNCTIONS),
    "prediction": Refused("drafts come from the model itself (MTP)"),
    "verbosity": Refused("the model has no such control; ask for it in a message", ("medium",)),
    "web_search_options": Refused("this server fetches nothing from the network"),
}

COMPLETION = {
    **COMMON,
    "best_of": Refused("completions are not ranked; use n and logprobs", (1,)),
    "suffix": Refused("the model was not trained to fill in a middle", ("",)),
}

MESSAGE = {
    "audio": Refused(_TEXT),
    "function_call": Refused(_FUNCTIONS),
    "refusal": Refused("send what was said as content"),
    "annotations": Refused("the model reads no annotations", ([],)),
}


def refusal(table: dict[str, Refused], body: dict[str, Any]) -> tuple[str, str] | None:
    """Takes what changes nothing out of ``body``; the first refused field and why, if any."""
    for field, row in table.items():
        if field not in body:
            continue
        value = body[field]
        if value is None or any(value == n and type(value) is type(n) for n in row.neutral):
            del body[field]
        else:
            return field, f"not supported: {row.reason}"
    return None
