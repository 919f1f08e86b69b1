"""Thinking and tool calls, written by a scripted model and read through OpenAI's client."""

from __future__ import annotations

import asyncio
import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
from conversations import BOTH, HI, THOUGHT, call
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI
from served import Scripted

from qnext.engine.outputs import StreamDelta
from qnext.hub import shipped_model
from qnext.server.answer import Answer
from qnext.server.chat import whole_chat
from qnext.server.forced import ForcedCalls
from qnext.text import ParserFormat, Tokenizer, ToolCall

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def ask(client: OpenAI, *, stream: bool, **asked: Any) -> Any:
    """One message, whole or added up from a stream by the client."""
    asked = {"model": "thinker", "messages": HI, "max_tokens": 200, **asked}
    if not stream:
        return client.chat.completions.create(**asked).choices[0]
    reasoning = ""
    with client.chat.completions.stream(**asked) as events:
        for event in events:
            if event.type == "chunk" and event.chunk.choices:
                delta = event.chunk.choices[0].delta
                reasoning += getattr(delta, "reasoning_content", None) or ""
        [choice] = events.get_final_completion().choices
    choice.message.reasoning_content = reasoning
    return choice


@pytest.mark.parametrize("stream", [False, True])
def test_parallel_calls_after_thinking(thinker: Scripted, thinker_client: OpenAI, stream):
    thinker.say(BOTH)
    choice = ask(thinker_client, stream=stream, tools=[TOOL])
    message = choice.message
    assert choice.finish_reason == "tool_calls"
    assert message.reasoning_content == THOUGHT
    assert message.content == "I look it up."
    cities = [json.loads(c.function.arguments)["city"] for c in message.tool_calls]
    assert cities == ["Rome", "Paris"]
    assert len({c.id for c in message.tool_calls}) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_when_parallel_ones_are_unwelcome(thinker, thinker_client, stream):
    thinker.say(BOTH)
    choice = ask(thinker_client, stream=stream, tools=[TOOL], parallel_tool_calls=False)
    assert len(choice.message.tool_calls) == 1
    assert choice.finish_reason == "tool_calls"


def test_no_tools_means_no_calls(thinker: Scripted, thinker_client: OpenAI):
    thinker.say(BOTH)
    choice = ask(thinker_client, stream=False, tools=[TOOL], tool_choice="none")
    assert choice.message.tool_calls is None
    assert call("Paris") in choice.message.content
    assert choice.finish_reason == "stop"


def test_a_cut_answer_says_so_and_a_cut_call_is_no_call(thinker, thinker_client):
    thinker.say("</think>\n\n" + call("Rome")[:-20])
    choice = ask(thinker_client, stream=False, tools=[TOOL])
    assert choice.message.tool_calls is None
    assert choice.message.content.startswith("<tool_call>")
    thinker.say(BOTH)
    choice = ask(thinker_client, stream=False, tools=[TOOL], max_tokens=4)
    assert choice.finish_reason == "length"
    assert choice.message.content == ""


def test_the_budget_of_thinking_is_kept_and_counted(thinker: Scripted, thinker_client: OpenAI):
    thinker.say("one two three four five six seven eight nine ten" * 4)
    done = thinker_client.chat.completions.create(
        model="thinker", messages=HI, max_tokens=30, extra_body={"max_thinking_tokens": 5}
    )
    [choice] = done.choices
    assert done.usage.completion_tokens_details.reasoning_tokens == 5
    assert choice.message.reasoning_content
    assert choice.message.content
    done = thinker_client.chat.completions.create(
        model="thinker", messages=HI, max_tokens=10, reasoning_effort="none"
    )
    assert done.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_schema_rules_the_answer_after_the_thinking(thinker, thinker_client):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}},
              "required": ["ok"], "additionalProperties": False}  # fmt: skip
    with thinker.free():
        done = thinker_client.chat.completions.create(
            model="thinker", messages=HI, max_tokens=60, seed=1,
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
            extra_body={"max_thinking_tokens": 4},
        )  # fmt: skip
    [choice] = done.choices
    assert choice.finish_reason == "stop"
    assert isinstance(json.loads(choice.message.content)["ok"], bool)


# ---------------------------------------------------------------- every split

PIECES = st.sampled_from(
    ["a", "\n", "é", "<think>", "</think>", "<tool_call>", "</tool_call>", call("Rome"),
     '{"name": "weather"', "}", '"', "</", "tool_call>", call("Pa<tool_call>ris"), "[", "{}"]
)  # fmt: skip


WORDS = Tokenizer.from_pretrained(shipped_model())


def add_up(text: str, cuts: list[int], prompt: str) -> dict[str, Any]:
    """The message that a client has after these deltas, without its random ids."""
    plan = SimpleNamespace(
        prompt=prompt, tools=[TOOL], forced=False, named=False, parallel=True, top_logprobs=None
    )
    loaded = SimpleNamespace(tokenizer=WORDS, format=ParserFormat(True, "hermes"))
    answer = Answer(0, loaded, plan)  # type: ignore[arg-type]
    edges = [0, *sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    deltas = [StreamDelta(text[a:b], []) for a, b in itertools.pairwise(edges)]
    deltas.append(StreamDelta("", [], "stop"))

    async def chunks():
        for delta in deltas:
            yield {"choices": answer.push(delta)}

    [choice] = asyncio.run(whole_chat(chunks()))["choices"]
    for found in choice["message"].get("tool_calls", ()):
        del found["id"]
        json.loads(found["function"]["arguments"])
    return choice


@settings(max_examples=150)
@given(
    st.lists(PIECES, max_size=8).map("".join),
    st.lists(st.integers(0, 200), max_size=12),
    st.sampled_from(["", "<think>\n"]),
)
def test_every_split_adds_up_to_the_whole(text, cuts, prompt):
    whole = add_up(text, [], prompt)
    assert add_up(text, cuts, prompt) == whole
    assert add_up(text, list(range(len(text))), prompt) == whole


CALLS = st.lists(
    st.fixed_dictionaries(
        {"name": st.text(max_size=5), "arguments": st.dictionaries(st.text(max_size=3), st.lists(
            st.text(alphabet='"\\[]{}a ', max_size=4), max_size=2), max_size=2)}
    ),
    max_size=3,
)  # fmt: skip


@given(CALLS, st.lists(st.integers(0, 300), max_size=12), st.sampled_from([None, 1]))
def test_forced_calls_are_read_at_every_split(calls, cuts, indent):
    text = json.dumps(calls, indent=indent)
    edges = [0, *sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    reader, found = ForcedCalls(), []
    for a, b in itertools.pairwise(edges):
        found += reader.push(text[a:b])
    assert reader.finish() == []
    assert [(c.name, json.loads(c.arguments)) for c in found] == [
        (c["name"], c["arguments"]) for c in calls
    ]
    assert [c.index for c in found] == list(range(len(calls)))


def test_a_forced_call_that_was_cut_is_text():
    reader = ForcedCalls()
    assert reader.push('[{"name": "a", "arguments": {}}, {"name": "b"') == [ToolCall(0, "a", "{}")]
    assert reader.finish()[0].text == '{"name": "b"'
