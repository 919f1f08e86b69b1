"""``/v1/responses`` through OpenAI's client."""

from __future__ import annotations

import json
from typing import get_type_hints

import openai
import pytest
from conversations import BOTH, MODEL, THOUGHT, WEATHER, Answer
from openai import OpenAI
from openai.types.responses import response_create_params
from served import Scripted

from qnext.server.errors import Refusal
from qnext.server.memory import Memory
from qnext.server.responses import ResponsesBody

TOOL = {"type": "function", **WEATHER["function"]}


def ask(client: OpenAI, *, stream: bool, **asked):
    asked = {"model": "thinker", "input": "Weather?", **asked}
    if not stream:
        return client.responses.create(**asked)
    numbers = []
    with client.responses.stream(**asked) as events:
        for event in events:
            numbers.append(event.sequence_number)
        assert numbers == list(range(len(numbers)))
        return events.get_final_response()


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_text_and_calls_are_items(thinker: Scripted, thinker_client: OpenAI, stream):
    thinker.say(BOTH)
    found = ask(thinker_client, stream=stream, tools=[TOOL])
    kinds = [item.type for item in found.output]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert found.output[0].content[0].text == THOUGHT
    assert found.output_text == "I look it up."
    assert [json.loads(c.arguments)["city"] for c in found.output[2:]] == ["Rome", "Paris"]
    assert found.status == "completed"
    assert found.usage.output_tokens_details.reasoning_tokens > 0
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_goes_on_from_the_one_before(thinker, thinker_client, stream):
    thinker.say(BOTH)
    first = ask(thinker_client, stream=stream, tools=[TOOL], instructions="Be short.")
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "21"}
        for item in first.output
        if item.type == "function_call"
    ]
    thinker.say("Ok.</think>\n\nWarm.")
    kept = ask(
        thinker_client, stream=stream, tools=[TOOL], input=results, previous_response_id=first.id,
        instructions="Be short.",
    )  # fmt: skip
    said = [{"role": "user", "content": "Weather?"}, *first.output, *results]
    sent = ask(
        thinker_client, stream=False, tools=[TOOL], instructions="Be short.",
        input=[i if isinstance(i, dict) else i.model_dump(exclude_none=True) for i in said],
    )  # fmt: skip
    assert kept.output_text == sent.output_text == "Warm."
    assert kept.usage.input_tokens == sent.usage.input_tokens
    assert sent.usage.input_tokens_details.cached_tokens == sent.usage.input_tokens
    assert thinker_client.responses.retrieve(kept.id).output_text == "Warm."
    thinker_client.responses.delete(kept.id)
    with pytest.raises(openai.NotFoundError):
        ask(thinker_client, stream=False, previous_response_id=kept.id)


def test_what_is_not_stored_is_not_remembered(thinker: Scripted, thinker_client: OpenAI):
    thinker.say("x</think>\n\ny")
    found = ask(thinker_client, stream=False, store=False)
    with pytest.raises(openai.NotFoundError):
        thinker_client.responses.retrieve(found.id)


def test_a_cut_response_is_incomplete(thinker: Scripted, thinker_client: OpenAI):
    thinker.say("x</think>\n\none two three four five six seven")
    found = ask(thinker_client, stream=False, max_output_tokens=6)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_a_pydantic_model_comes_back_parsed(client: OpenAI):
    found = client.responses.parse(model=MODEL, input="x", text_format=Answer)
    assert isinstance(found.output_parsed, Answer)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "text parts only"),
        ({"input": [{"type": "computer_call"}]}, "computer_call"),
        ({"input": [{"role": "user"}]}, "'content' is missing"),
        ({"background": True}, "awaited"),
        ({"truncation": "auto"}, "refused"),
        ({"tools": [{"type": "web_search"}]}, "'function'"),
        ({"text": {"verbosity": "low"}}, "no such control"),
        ({"extra_body": {"no_such": 1}}, "no such field"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_reason(thinker_client: OpenAI, changes, says):
    with pytest.raises(openai.BadRequestError, match=says):
        ask(thinker_client, stream=False, **changes)


def test_memory_is_bounded_and_of_one_key():
    memory = Memory(max_bytes=1000)
    for number in range(20):
        memory.keep(f"resp_{number}", "a", [{"role": "user", "content": "x" * 100}], {})
        assert memory.num_bytes <= 1000
    assert memory.recall("resp_19", "a")
    for name, key in (("resp_0", "a"), ("resp_19", "b")):
        with pytest.raises(Refusal, match="does not exist"):
            memory.recall(name, key)
    memory.forget("resp_19", "a")
    with pytest.raises(Refusal):
        memory.response("resp_19", "a")


def test_every_field_is_honoured_or_refused_with_a_reason(repository):
    theirs = {*get_type_hints(response_create_params.ResponseCreateParamsBase), "stream"}
    honoured, refused = set(ResponsesBody.model_fields), set(ResponsesBody.refused)
    assert theirs <= honoured | refused
    assert not honoured & refused
    document = (repository / "docs/serving.md").read_text(encoding="utf-8")
    assert [name for name in honoured | refused if f"`{name}`" not in document] == []
