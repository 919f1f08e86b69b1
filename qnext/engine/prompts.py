"""The many ways to write a prompt, made one: a text or a list of token ids."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

from qnext.errors import RequestError


class TextPrompt(TypedDict):
    """vLLM's dict of a text prompt."""

    prompt: str


class TokensPrompt(TypedDict):
    """vLLM's dict of a prompt of token ids."""

    prompt_token_ids: list[int]


Prompt = str | list[int] | TextPrompt | TokensPrompt


class ParsedPrompt(NamedTuple):
    """Exactly one of the two is given."""

    text: str | None
    token_ids: list[int] | None


def parse_prompts(prompts: Any) -> list[ParsedPrompt]:
    """One entry per prompt; a single prompt gives a list of one.

    Raises:
        RequestError: something that is no prompt.
    """
    if hasattr(prompts, "tolist"):  # a tensor or an array of ids
        prompts = prompts.tolist()
    if isinstance(prompts, (str, dict)):
        return [parse_prompt(prompts)]
    if not isinstance(prompts, (list, tuple)):
        raise _no_prompt(prompts)
    if prompts and isinstance(prompts[0], int):
        return [parse_prompt(prompts)]
    return [parse_prompt(prompt) for prompt in prompts]


def parse_prompt(prompt: Any) -> ParsedPrompt:
    """One prompt.

    Raises:
        RequestError: it is neither text nor token ids nor a dict of one of them.
    """
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        return ParsedPrompt(prompt, None)
    if isinstance(prompt, (list, tuple)):
        return ParsedPrompt(None, list(prompt))
    if isinstance(prompt, dict):
        if isinstance(prompt.get("prompt_token_ids"), (list, tuple)):
            return ParsedPrompt(None, list(prompt["prompt_token_ids"]))
        if isinstance(prompt.get("prompt"), str):
            return ParsedPrompt(prompt["prompt"], None)
    raise _no_prompt(prompt)


def parse_conversations(messages: Any) -> list[list[dict[str, Any]]]:
    """One entry per conversation; a single conversation gives a list of one.

    Raises:
        RequestError: neither a list of messages nor a list of such lists.
    """
    if not isinstance(messages, (list, tuple)):
        raise _no_conversation(messages)
    many = messages if messages and isinstance(messages[0], (list, tuple)) else [messages]
    for conversation in many:
        if not isinstance(conversation, (list, tuple)):
            raise _no_conversation(conversation)
        for message in conversation:
            if not isinstance(message, dict):
                raise _no_conversation(message)
    return [list(conversation) for conversation in many]


def _no_conversation(found: Any) -> RequestError:
    return RequestError(
        f"a conversation must be a list of messages, found {type(found).__name__}",
        hint="a message is a dict with 'role' and 'content'",
    )


def _no_prompt(found: Any) -> RequestError:
    return RequestError(
        f"a prompt must be a text or a list of token ids, found {type(found).__name__}",
        hint="or a dict with 'prompt' or 'prompt_token_ids'; a list of those for several prompts",
    )
