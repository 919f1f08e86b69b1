"""``/v1/chat/completions``: messages through the chat template, answers through the parsers."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from qnext.engine.outputs import StreamDelta
from qnext.engine.sampling_params import SamplingParams
from qnext.errors import TextError
from qnext.server.answer import Answer
from qnext.server.errors import Refusal
from qnext.server.forced import calls_schema
from qnext.server.schema import ChatBody, Message, NamedTool, Tool
from qnext.server.service import Loaded, Service, usage
from qnext.server.streaming import steps

EFFORT: dict[str, int | None] = {
    "none": 0,
    "minimal": 512,
    "low": 2048,
    "medium": 8192,
    "high": 32768,
    "xhigh": None,
}
"""Most tokens of thinking for each ``reasoning_effort``; None sets no limit."""

NO_TEMPLATE = (
    "this is a base model: it has no chat template and cannot chat; "
    "use /v1/completions, or start the server with --chat-template"
)


@dataclass(frozen=True)
class Plan:
    """A chat request, ready to run.

    Attributes:
        prompt: rendered text.
        params: of the sampling.
        tools: shown to the model, as plain data.
        forced: the answer is a list of calls.
        named: a certain function must be called.
        parallel: more than one call is welcome.
        top_logprobs: alternatives per token; None reports no log-probabilities.
    """

    prompt: str
    params: SamplingParams
    tools: list[dict[str, Any]]
    forced: bool
    named: bool
    parallel: bool
    top_logprobs: int | None


def render(
    loaded: Loaded,
    messages: list[Message],
    tools: list[Tool] | None,
    options: dict[str, Any],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt of a conversation.

    Raises:
        Refusal: a base model, or messages that the template refuses.
    """
    if loaded.template is None:
        raise Refusal(NO_TEMPLATE, param="messages", code="no_chat_template")
    try:
        return loaded.template.render(
            [message.model_dump(exclude_none=True) for message in messages],
            plain_tools(tools) or None,
            add_generation_prompt,
            **options,
        )
    except TextError as error:
        hint = f" ({error.hint})" if error.hint else ""
        raise Refusal(f"{error}{hint}", param="messages") from error


def plain_tools(tools: list[Tool] | None) -> list[dict[str, Any]]:
    """Tools as the template shows them."""
    return [tool.model_dump(exclude_none=True) for tool in tools or ()]


def plan(service: Service, loaded: Loaded, body: ChatBody) -> Plan:
    """Check a body and render its prompt.

    Raises:
        RequestError: it cannot be served.
    """
    service.check_logprobs(body.top_logprobs)
    choice = body.tool_choice
    tools = [] if choice == "none" else list(body.tools or ())
    only = choice.function.name if isinstance(choice, NamedTool) else None
    named = only is not None
    forced = named or choice == "required"
    parallel = body.parallel_tool_calls is not False and not named
    more: dict[str, Any] = {"max_tokens": body.max_completion_tokens or body.max_tokens}
    if body.logprobs:
        more["logprobs"] = body.top_logprobs or 0
    form = _form(body)
    if tools and form and not forced:
        raise Refusal(
            "response_format and structured_outputs do not go together with tools that may be"
            " called: a constrained answer could not begin a call",
            param="response_format",
        )
    if forced:
        if form:
            raise Refusal("tool_choice already decides the form", param="response_format")
        wanted = [tool for tool in tools if only in (None, tool.function.name)]
        form = {"json": calls_schema(wanted, parallel=parallel)}
    if form:
        more["structured_outputs"] = form
    if tools and not forced and loaded.format.tools is None:
        raise Refusal("the chat template of this model knows no tools", param="tools")
    options = dict(body.chat_template_kwargs or {})
    more |= _effort(loaded, body, options)
    prompt = render(loaded, body.messages, tools, options)
    return Plan(
        prompt=prompt,
        params=service.sampling(loaded, body, **more),
        tools=plain_tools(tools),
        forced=forced,
        named=named,
        parallel=parallel,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


async def chat_chunks(
    service: Service, loaded: Loaded, body: ChatBody, key: str
) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of an answer; the last one has its usage."""
    ready = await asyncio.to_thread(plan, service, loaded, body)
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": loaded.name,
    }
    async with aclosing(answer_deltas(service, loaded, ready, key)) as news:
        async for pieces, counts in news:
            chunk = {**head, "choices": pieces}
            if not pieces:
                chunk["usage"] = counts
            yield chunk


Pieces = tuple[list[dict[str, Any]], dict[str, Any] | None]
"""Choices of one chunk; the first comes with the usage so far, a last one has the usage alone."""


async def answer_deltas(
    service: Service, loaded: Loaded, ready: Plan, key: str
) -> AsyncGenerator[Pieces, None]:
    """Run a plan: what each choice gains, and at the end the usage."""
    n = ready.params.n
    with service.count(loaded, key, n) as priority:
        async with loaded.engine.open(ready.prompt, ready.params, priority=priority) as stream:
            answers = [Answer(index, loaded, ready) for index in range(n)]
            reasons: list[str] = []
            request = stream.request
            prompt = len(request.prompt_token_ids)
            yield [answer.opening() for answer in answers], usage(prompt, 0, [request.metrics])
            async with aclosing(steps([stream], service.options.max_seconds)) as news:
                async for _, deltas in news:
                    pieces = [piece for delta in deltas for piece in _pieces(answers, delta)]
                    reasons += [d.finish_reason for d in deltas if d.finish_reason is not None]
                    if pieces:
                        yield pieces, None
                    if all(answer.ended for answer in answers):
                        break
            service.metrics.finished(request.metrics, reasons)
            completion = sum(answer.num_tokens for answer in answers)
            counts = usage(prompt, completion, [request.metrics])
            if loaded.format.reasoning:
                thought = sum(answer.num_reasoning for answer in answers)
                counts["completion_tokens_details"] = {"reasoning_tokens": thought}
            yield [], counts


def _pieces(answers: list[Answer], delta: StreamDelta) -> list[dict[str, Any]]:
    answer = answers[delta.index]
    return [] if answer.ended else answer.push(delta)


async def whole_chat(chunks: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any]:
    """All chunks added up to one answer."""
    answer: dict[str, Any] = {}
    found: dict[int, dict[str, Any]] = {}
    async with aclosing(chunks) as each:
        async for chunk in each:
            answer = {**chunk, "object": "chat.completion"}
            for piece in chunk["choices"]:
                _add(found.setdefault(piece["index"], _empty(piece["index"])), piece)
    for choice in found.values():
        message = choice["message"]
        if message.get("tool_calls") and not message["content"]:
            message["content"] = None
    answer["choices"] = [choice for _, choice in sorted(found.items())]
    return answer


def _empty(index: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": "", "refusal": None}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": None}


def _add(choice: dict[str, Any], piece: dict[str, Any]) -> None:
    message, delta = choice["message"], piece["delta"]
    for name in ("content", "reasoning_content"):
        if delta.get(name):
            message[name] = message.get(name, "") + delta[name]
    for call in delta.get("tool_calls", ()):
        plain = {name: value for name, value in call.items() if name != "index"}
        message.setdefault("tool_calls", []).append(plain)
    if piece["logprobs"] is not None:
        choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
        choice["logprobs"]["content"] += piece["logprobs"]["content"]
    if piece["finish_reason"] is not None:
        choice["finish_reason"] = piece["finish_reason"]
    if "stop_reason" in piece:
        choice["stop_reason"] = piece["stop_reason"]


def _form(body: ChatBody) -> dict[str, Any]:
    """The form that the body asks of the answer, in the engine's words; empty for none."""
    asked = body.response_format
    if asked is None or asked.type == "text":
        if body.structured_outputs is None:
            return {}
        return body.structured_outputs.model_dump(by_alias=True, exclude_none=True)
    if body.structured_outputs is not None:
        raise Refusal("give response_format or structured_outputs", param="response_format")
    if asked.json_schema is None:
        return {"json_object": True}
    schema = asked.json_schema.schema_
    return {"json_object": True} if schema is None else {"json": schema}


def _effort(loaded: Loaded, body: ChatBody, options: dict[str, Any]) -> dict[str, Any]:
    """Budget of thinking; ``options`` of the template are set where it knows them."""
    effort = body.reasoning_effort
    if effort is None:
        return {}
    thinks = loaded.format.reasoning
    source = "" if loaded.template is None else loaded.template.source()
    if not thinks and effort != "none":
        raise Refusal("this model does not think", param="reasoning_effort")
    if "enable_thinking" in source:
        options.setdefault("enable_thinking", effort != "none")
    if "reasoning_effort" in source:
        options.setdefault("reasoning_effort", effort)
    budget = EFFORT[effort]
    if not thinks or budget is None or body.max_thinking_tokens is not None:
        return {}
    return {"max_thinking_tokens": budget}
