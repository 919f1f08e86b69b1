from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from qnext.errors import TextError
from qnext.text import ChatTemplate, default_template, normalize_messages

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather <now> in a “city” ",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": " The city", "enum": ["Köln", "北京"]},
                "days": {"type": ["integer", "null"], "default": 3},
            },
            "required": ["city"],
        },
    },
}
PING = {"type": "function", "function": {"name": "ping"}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi"}],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nHm\n</think>\n\nHello!"},
        {"role": "user", "content": "你好 👋"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "\nI need tools\n",
            "tool_calls": [call("get_weather", city="Köln", days=2), call("ping", deep=[1, None])],
        },
        {"role": "tool", "content": '{"t": 9}'},
        {"role": "tool", "content": "pong"},
        {"role": "assistant", "content": "", "tool_calls": [call("ping", ok=True)]},
        {"role": "tool", "content": "pong"},
        {"role": "assistant", "content": "Nine degrees."},
    ],
    "two rounds": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "old"},
        {"role": "system", "content": "late"},
        {"role": "user", "content": "<tool_response>\nx\n</tool_response>"},
        {"role": "assistant", "content": "\n\nc"},
    ],
}


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("tools", [None, [WEATHER, PING]], ids=["plain", "tools"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("kind", ["instruct", "thinking", "coder"])
def test_our_templates_render_the_same_in_transformers(
    hf_tokenizer: Any, kind: str, chat: str, tools: Any, generate: bool
) -> None:
    template = default_template(kind)
    expected = hf_tokenizer.apply_chat_template(
        CHATS[chat],
        tools=tools,
        chat_template=template.source(),
        add_generation_prompt=generate,
        tokenize=False,
    )
    assert template.render(CHATS[chat], tools, generate) == expected


def test_the_instruct_prompt_word_for_word() -> None:
    rendered = default_template("instruct").render(CHATS["tools"][:4], [PING])
    assert rendered == (
        "<|im_start|>system\n# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "ping"}}\n</tools>\n\n'
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\nLet me look.\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}\n'
        "</tool_call>\n"
        '<tool_call>\n{"name": "ping", "arguments": {"deep": [1, null]}}\n</tool_call><|im_end|>\n'
        '<|im_start|>user\n<tool_response>\n{"t": 9}\n</tool_response>\n'
        "<tool_response>\npong\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_thinking_prompt_keeps_reasoning_after_the_last_query_only() -> None:
    rendered = default_template("thinking").render(CHATS["tools"])
    assert "assistant\n<think>\nI need tools\n</think>\n\nLet me look.\n<tool_call>" in rendered
    assert rendered.endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\nNine degrees.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
    rendered = default_template("thinking").render(CHATS["two rounds"], None, False)
    assert rendered == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nold\n</think>\n\nb<|im_end|>\n"
        "<|im_start|>system\nlate<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nx\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nc<|im_end|>\n"
    )
    assert "Hm" not in default_template("thinking").render(CHATS["system"])


def test_the_coder_prompt_word_for_word() -> None:
    rendered = default_template("coder").render(CHATS["tools"][:4], [WEATHER, PING])
    head, _, rest = rendered.partition("</tools>")
    assert head == (
        "<|im_start|>system\nYou are Qwen, a helpful AI assistant that can interact with a "
        "computer to solve tasks.\n\n# Tools\n\nYou have access to the following functions:"
        "\n\n<tools>\n<function>\n<name>get_weather</name>\n<description>Weather <now> in a “city”"
        "</description>\n<parameters>\n<parameter>\n<name>city</name>\n<type>string</type>\n"
        '<description>The city</description>\n<enum>["Köln", "北京"]</enum>\n</parameter>\n'
        "<parameter>\n<name>days</name>\n<type>['integer', 'null']</type>\n<default>3</default>\n"
        '</parameter>\n<required>["city"]</required>\n</parameters>\n</function>\n'
        "<function>\n<name>ping</name>\n<parameters>\n</parameters>\n</function>\n"
    )
    assert rest.partition("</IMPORTANT>")[2] == (
        "<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\nLet me look.\n\n<tool_call>\n<function=get_weather>\n"
        "<parameter=city>\nKöln\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n"
        "</tool_call>\n<tool_call>\n<function=ping>\n<parameter=deep>\n[1, null]\n</parameter>\n"
        "</function>\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n"
        '{"t": 9}\n</tool_response>\n<tool_response>\npong\n</tool_response>\n<|im_end|>\n'
        "<|im_start|>assistant\n"
    )


HYBRID = """
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- 'A:' }}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
    {%- else %}
        {{- m.role ~ ':' ~ m.content }}
    {%- endif %}
    {% if loop.first %}{% continue %}{% endif %}
  |{{ loop.index }}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{{ documents | tojson(indent=2) }} {{ tools | tojson }} {{ strftime_now('%Y') }}
{%- set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}
"""


@pytest.mark.parametrize("thinking", [True, False, None])
def test_options_and_syntax_equal_transformers(hf_tokenizer: Any, thinking: bool | None) -> None:
    documents = [{"title": "Ä", "text": "<b>"}]
    template = ChatTemplate(HYBRID, special_tokens={"eos_token": "<|im_end|>"})
    expected = hf_tokenizer.apply_chat_template(
        CHATS["system"],
        tools=[WEATHER],
        documents=documents,
        chat_template=HYBRID,
        add_generation_prompt=True,
        tokenize=False,
        **({} if thinking is None else {"enable_thinking": thinking}),
    )
    rendered = template.render(
        CHATS["system"], [WEATHER], documents=documents, enable_thinking=thinking
    )
    assert rendered == expected


@pytest.mark.parametrize("kind", ["instruct", "thinking", "coder"])
@pytest.mark.parametrize("chat", CHATS)
def test_spans_cover_the_assistant_and_nothing_else(kind: str, chat: str) -> None:
    found = default_template(kind).render_with_spans(CHATS[chat], [PING], False)
    turns = found.text.split("<|im_start|>assistant\n")[1:]
    ends = [turn.index("<|im_end|>") + len("<|im_end|>") for turn in turns]
    expected = [turn[:end] for turn, end in zip(turns, ends, strict=True)]
    assert [found.text[start:end] for start, end in found.spans] == expected


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{{ 'x' * 10**9 }}",
        "{{ [0] * 10**10 }}",
        "{{ 9 ** 99999999 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ 'x'.ljust(10**9) }}",
        "{{ 'x' | center(10**9) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ strftime_now('%999999999d') }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{% set ns = namespace(x='xx') %}{% for i in range(99) %}"
        "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='xx') %}{% for i in range(99) %}"
        "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=7) %}{% for i in range(99) %}"
        "{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{{ ('x' * 9999).replace('x', 'y' * 9999) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception._private() }}",
        "{% include 'x' %}",
        "{{ messages[7].role }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no such role') }}",
    ],
)
def test_abuse_is_refused_quickly(source: str) -> None:
    start = time.perf_counter()
    with pytest.raises(TextError, match=r"chat template|the prompt"):
        ChatTemplate(source).render(CHATS["one"])
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% generation %}", "x" * 300_000])
def test_what_is_no_template(source: str) -> None:
    with pytest.raises(TextError, match="chat template 'default'"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ("hello", "at least one"),
        ([3], "message 0 is int"),
        ([{"content": "x"}], "message 0: role is None"),
        ([{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}], "message 1: role"),
        ([{"role": "user"}], "message 0: no content"),
        ([{"role": "assistant", "content": None}], "message 0: no content"),
        ([{"role": "user", "content": 3}], "message 0: content is int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "content part 0 is 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content part 0 has no text"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "tool_calls in a user"),
        ([{"role": "assistant", "tool_calls": [{}]}], "tool call 0 has no function name"),
        ([{"role": "assistant", "tool_calls": {"a": 1}}], "not a list"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], "not JSON"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[]"}]}],
            "not an object",
        ),
        ([{"role": "user", "content": "x", "extra": object()}], "message 0: extra holds object"),
        ([{"role": "assistant", "reasoning": 3, "content": ""}], "reasoning_content is not text"),
    ],
)
def test_wrong_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(TextError, match=message):
        default_template("instruct").render(messages)


def test_messages_take_one_form() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = {"role": "assistant", "content": None, "reasoning": "r", "refusal": None}
    asked["tool_calls"] = [{"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    found = normalize_messages([{"role": "developer", "content": parts}, asked])
    assert found[0] == {"role": "system", "content": "ab"}
    calls = [{"id": "1", "function": {"name": "f", "arguments": {"x": 1}}}]
    expected = {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": calls}
    assert found[1] == expected


def test_unknown_options_and_tools_without_a_name() -> None:
    template = default_template("instruct")
    with pytest.raises(TextError, match="unknown chat template option enable_thought"):
        template.render(CHATS["one"], enable_thought=True)
    with pytest.raises(TextError, match="tool 1 has no function name"):
        template.render(CHATS["one"], [PING, {"type": "function"}])
    with pytest.raises(TextError, match="no chat template of kind"):
        default_template("poet")


def test_the_folder_decides(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="no chat template in"):
        ChatTemplate.from_pretrained(tmp_path)
    fallback = ChatTemplate.from_pretrained(tmp_path, default="thinking")
    assert fallback.render(CHATS["one"]) == default_template("thinking").render(CHATS["one"])
    config: dict[str, Any] = {"eos_token": {"content": "<end>"}}
    config["chat_template"] = [
        {"name": "default", "template": "plain{{ eos_token }}"},
        {"name": "tool_use", "template": "tools"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_pretrained(tmp_path)
    assert template.render(CHATS["one"]) == "plain<end>"
    assert template.render(CHATS["one"], [PING]) == "tools"
    (tmp_path / "chat_template.jinja").write_text("file{{ eos_token }}")
    assert ChatTemplate.from_pretrained(tmp_path).render(CHATS["one"]) == "file<end>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not an object"),
        ('{"chat_template": 3}', "is not text"),
        ('{"chat_template": [{"name": "default"}]}', "damaged list"),
    ],
)
def test_damaged_configs(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(TextError, match=message):
        ChatTemplate.from_pretrained(tmp_path)
