"""``/v1/messages`` through Anthropic's client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_type_hints

import anthropic
import pytest
from anthropic import Anthropic
from anthropic.types import message_create_params
from conversations import BOTH, HI, THOUGHT
from served import Process, Scripted

from qnext.server.anthropic import MessagesBody

TOOL = {
    "name": "weather",
    "description": "Weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Paris"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def claude(thinker: Scripted) -> Iterator[Anthropic]:
    with Anthropic(base_url=thinker.url, api_key="none", max_retries=0) as found:
        yield found


def ask(client: Anthropic, *, stream: bool, **asked):
    asked = {"model": "thinker", "max_tokens": 200, "messages": HI, **asked}
    if not stream:
        return client.messages.create(**asked)
    with client.messages.stream(**asked) as events:
        for _ in events:
            pass
        return events.get_final_message()


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_text_and_calls_are_blocks(thinker: Scripted, claude: Anthropic, stream):
    thinker.say(BOTH)
    message = ask(claude, stream=stream, tools=[TOOL])
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    thought, text, *calls = message.content
    assert thought.thinking == THOUGHT
    assert text.text == "I look it up."
    assert [call.input for call in calls] == [{"city": "Rome"}, {"city": "Paris"}]
    assert message.stop_reason == "tool_use"
    usage = message.usage
    count = claude.messages.count_tokens(model="thinker", messages=HI, tools=[TOOL]).input_tokens
    assert usage.input_tokens + usage.cache_read_input_tokens == count
    assert usage.output_tokens > 30


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_goes_on_after_results(thinker: Scripted, claude: Anthropic, stream):
    thinker.say(BOTH)
    first = ask(claude, stream=False, tools=[TOOL])
    calls = [block for block in first.content if block.type == "tool_use"]
    results = [
        {"type": "tool_result", "tool_use_id": one.id, "content": [{"type": "text", "text": "21"}]}
        for one in calls
    ]
    messages = [
        *HI,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [*results, {"type": "text", "text": "So?"}]},
    ]
    thinker.say("Warm.</think>\n\nIt is 21 degrees STOP there")
    system = [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}]
    message = ask(
        claude, stream=stream, tools=[TOOL], messages=messages, system=system,
        stop_sequences=[" STOP"], metadata={"user_id": "me"},
    )  # fmt: skip
    assert message.content[-1].text == "It is 21 degrees"
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " STOP")


def test_any_tool_means_a_valid_call(process: Process):
    with Anthropic(base_url=process.url, api_key="none", max_retries=0) as client:
        for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
            message = client.messages.create(
                model="qnext-small", max_tokens=100, messages=HI, tools=[TOOL],
                tool_choice={**choice, "disable_parallel_tool_use": True},
            )  # fmt: skip
            [call] = message.content
            assert call.input["city"] in ("Rome", "Paris")
            assert message.stop_reason == "tool_use"


def test_the_budget_of_thinking_is_kept(thinker: Scripted, claude: Anthropic):
    thinker.say("one two three four five six seven eight nine ten " * 4)
    message = ask(
        claude, stream=False, max_tokens=20, thinking={"type": "enabled", "budget_tokens": 5}
    )
    assert message.content[0].type == "thinking"
    assert message.stop_reason == "max_tokens"
    assert len(message.content[0].thinking.split()) <= 5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image' block"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'text' is missing"),
        ({"service_tier": "batch"}, "there is one"),
        ({"extra_body": {"temperature": 1.5}}, "less than or equal to 1"),
        ({"tool_choice": {"type": "any"}}, "needs tools"),
        ({"extra_body": {"no_such": 1}}, "no such field"),
    ],
)
def test_refusals_have_anthropics_form(claude: Anthropic, changes, says):
    with pytest.raises(anthropic.BadRequestError, match=says) as failure:
        ask(claude, stream=False, **changes)
    assert failure.value.body["type"] == "error"
    assert failure.value.body["error"]["type"] == "invalid_request_error"


def test_every_field_is_honoured_or_refused_with_a_reason(repository):
    theirs = {*get_type_hints(message_create_params.MessageCreateParamsBase), "stream"}
    honoured, refused = set(MessagesBody.model_fields), set(MessagesBody.refused)
    theirs |= {"temperature", "top_p", "top_k"}
    assert theirs <= honoured | refused
    document = (repository / "docs/serving.md").read_text(encoding="utf-8")
    assert [name for name in honoured | refused if f"`{name}`" not in document] == []
