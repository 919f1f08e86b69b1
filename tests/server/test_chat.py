"""``/v1/chat/completions`` through OpenAI's client, against a real process."""

from __future__ import annotations

import json
import math

import openai
import pytest
from conversations import CLOCK, MODEL, WEATHER, Answer
from openai import OpenAI

HI = [{"role": "user", "content": "What is a transaction?"}]


def test_a_stream_adds_up_to_the_answer(client: OpenAI):
    asked = {
        "model": MODEL,
        "messages": HI,
        "max_completion_tokens": 10,
        "seed": 11,
        "n": 2,
        "temperature": 1.0,
    }
    whole = client.chat.completions.create(**asked)
    texts, roles, reasons, usage = ["", ""], [None, None], [None, None], None
    for chunk in client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] = choice.delta.role or roles[choice.index]
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert roles == ["assistant"] * 2
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens == 20
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens


def test_logprobs_spell_the_answer_in_bytes_streamed_or_not(client: OpenAI):
    asked = {
        "model": MODEL,
        "messages": HI,
        "max_tokens": 8,
        "seed": 2,
        "logprobs": True,
        "top_logprobs": 3,
    }
    [choice] = client.chat.completions.create(**asked).choices
    steps = choice.logprobs.content
    assert len(steps) == 8
    assert bytes(b for step in steps for b in step.bytes).decode() == choice.message.content
    for step in steps:
        assert len(step.top_logprobs) == 3
        values = [top.logprob for top in step.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert sum(math.exp(value) for value in values) <= 1 + 1e-5
    streamed = [
        step
        for chunk in client.chat.completions.create(**asked, stream=True)
        for one in chunk.choices
        if one.logprobs
        for step in one.logprobs.content
    ]
    assert streamed == steps


def test_a_pydantic_model_comes_back_parsed(client: OpenAI):
    done = client.chat.completions.parse(
        model=MODEL, messages=HI, response_format=Answer, max_tokens=120, seed=1
    )
    assert isinstance(done.choices[0].message.parsed, Answer)


def test_any_json_object_is_one(client: OpenAI):
    """Short of an end the text is the beginning of an object; with one it is an object."""
    [choice] = client.chat.completions.create(
        model=MODEL, messages=HI, response_format={"type": "json_object"}, max_tokens=60, seed=4,
        logit_bias={"92": 8},
    ).choices  # fmt: skip
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_is_one_by_the_schema(client: OpenAI, stream):
    asked = {
        "model": MODEL,
        "messages": HI,
        "tools": [WEATHER, CLOCK],
        "tool_choice": "required",
        "max_tokens": 200,
        "seed": 3,
        "parallel_tool_calls": False,
    }
    if stream:
        with client.chat.completions.stream(**asked) as events:
            [choice] = events.get_final_completion().choices
    else:
        [choice] = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    check(call)


def test_a_named_call_is_that_one(client: OpenAI):
    named = {"type": "function", "function": {"name": "weather"}}
    [choice] = client.chat.completions.create(
        model=MODEL, messages=HI, tools=[CLOCK, WEATHER], tool_choice=named, max_tokens=200, seed=3
    ).choices
    [call] = choice.message.tool_calls
    assert call.function.name == "weather"
    assert choice.finish_reason == "stop"
    check(call)


def check(call):
    arguments = json.loads(call.function.arguments)
    assert call.id.startswith("call_")
    if call.function.name == "clock":
        assert arguments == {}
        return
    assert arguments["city"] in ("Paris", "Rome")
    assert 1 <= arguments["days"] <= 9
    assert len(arguments) == 2


def test_a_conversation_with_calls_and_results_goes_on(client: OpenAI):
    called = {"id": "call_1", "type": "function",
              "function": {"name": "clock", "arguments": "{}"}}  # fmt: skip
    messages = [
        {"role": "developer", "content": "Be short."},
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [called], "refusal": None},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "12:00"}]},
    ]
    asked = {"model": MODEL, "messages": messages, "tools": [CLOCK], "max_tokens": 4, "seed": 1}
    assert client.chat.completions.create(**asked).choices[0].message.content


@pytest.mark.parametrize(
    ("changes", "says", "param"),
    [
        ({"messages": []}, "at least 1", "messages"),
        ({"messages": [{"role": "user"}]}, "message 0: no content", "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "text parts only",
            "messages",
        ),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "no such field", None),
        ({"top_logprobs": 2}, "needs logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, "at most 20", None),
        ({"reasoning_effort": "high"}, "does not think", "reasoning_effort"),
        ({"tool_choice": "required"}, "needs tools", None),
        ({"tools": [CLOCK, CLOCK]}, "same name", None),
        ({"tools": [CLOCK], "response_format": {"type": "json_object"}}, "called", None),
        ({"tools": [{"type": "web_search"}]}, "'function'", None),
        ({"functions": [{"name": "f"}]}, "use tools", "functions"),
        ({"audio": {"voice": "x", "format": "mp3"}}, "text only", "audio"),
        ({"store": True}, "nothing is stored", "store"),
        ({"extra_body": {"chat_template_kwargs": {"no_such": 1}}}, "unknown chat template", None),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "contradict", None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {
                "name": "x", "schema": {"not": {}}}}},
            "not", None,
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_with_a_reason(client: OpenAI, changes, says, param):
    asked = {"model": MODEL, "messages": HI, "max_tokens": 4, **changes}
    if "max_completion_tokens" not in changes:
        asked.setdefault("max_tokens", 4)
    with pytest.raises(openai.BadRequestError) as failure:
        client.chat.completions.create(**asked)
    assert says in failure.value.message
    if param is not None:
        assert failure.value.param == param


def test_tokenize_and_detokenize_are_inverse(client: OpenAI, process):
    import httpx

    with httpx.Client(base_url=process.url) as http:
        text = "Zwölf Boxkämpfer <|im_end|> 你好"
        found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
        back = http.post("/detokenize", json={"tokens": found["tokens"]}).json()
        assert back == {"prompt": text}
        chat = http.post("/tokenize", json={"messages": HI}).json()
        used = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=1).usage
        assert chat["count"] == used.prompt_tokens
        assert http.post("/detokenize", json={"tokens": [9000]}).status_code == 400
        assert http.post("/tokenize", json={}).status_code == 400
