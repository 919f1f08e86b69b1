from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.errors import TextError
from qnext.text import (
    ChatTemplate,
    ContentDelta,
    ParsedMessage,
    ParserFormat,
    ReasoningDelta,
    Tokenizer,
    default_template,
    parser_for,
)

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "n": {"type": "integer"},
                    "x": {"type": "number"},
                    "on": {"type": "boolean"},
                    "items": {"type": "array"},
                    "o": {"type": "object"},
                    "maybe": {"type": ["integer", "null"]},
                    "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
                },
            },
        },
    }
]
HERMES = '<tool_call>\n{"name": "f", "arguments": {"text": "a"}}\n</tool_call>'
CODER = "<tool_call>\n<function=f>\n<parameter=text>\na\n</parameter>\n</function>\n</tool_call>"
SCRAPS = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", HERMES, CODER, "\n", "\n\n", " "),
        *("a", "<", "</", "<tool", '{"name": "f", "arguments": {"text": "', '"}}', "\\", '"', "é"),
        *("<function=f>", "<parameter=text>", "</parameter>", "</function>"),
    ]
)
FORMATS = [ParserFormat(r, t) for r in (False, True) for t in (None, "hermes", "coder_xml")]


@settings(max_examples=600, deadline=None)
@given(
    scraps=st.lists(SCRAPS, max_size=14),
    kind=st.sampled_from(FORMATS),
    prompt=st.sampled_from(["", "<think>\n"]),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
)
def test_any_split_adds_up_to_the_whole(
    scraps: list[str], kind: ParserFormat, prompt: str, cuts: list[int]
) -> None:
    text = "".join(scraps)
    parser, events, at, i = kind.start(prompt, TOOLS), [], 0, 0
    while at < len(text):
        events += parser.push(text[at : at + cuts[i % len(cuts)]])
        at += cuts[i % len(cuts)]
        i += 1
    events += parser.finish()
    whole = kind.start(prompt, TOOLS).parse(text)
    assert ParsedMessage.of(events) == whole
    assert all(json.loads(call.arguments) is not None for call in whole.tool_calls)
    assert [call.index for call in whole.tool_calls] == list(range(len(whole.tool_calls)))
    if not whole.tool_calls:  # nothing but newlines and think tags may be lost
        kept = (whole.reasoning + whole.content).replace("\n", "")
        said = text.replace("\n", "")
        assert len(said) - len(kept) <= len(" " * said.count(" ") + "<think></think>")


@settings(max_examples=200, deadline=None)
@given(
    reasoning=st.none() | st.text("ab <\n", min_size=1).map(lambda s: s.strip("\n")),
    content=st.text("xy <", max_size=20).map(str.strip),
    arguments=st.lists(
        st.dictionaries(st.sampled_from(["text", "k"]), st.text(max_size=12), max_size=2),
        max_size=3,
    ),
    kind=st.sampled_from(["instruct", "thinking"]),
)
def test_what_the_template_writes_is_read_back(
    reasoning: str | None, content: str, arguments: list[dict[str, str]], kind: str
) -> None:
    template = default_template(kind)
    calls = [{"function": {"name": "f", "arguments": a}} for a in arguments]
    ask = [{"role": "user", "content": "q"}]
    said: dict[str, Any] = {"role": "assistant", "content": content, "tool_calls": calls}
    if kind == "thinking":
        said["reasoning_content"] = reasoning or "r"
    prompt = template.render(ask, TOOLS)
    whole = template.render([*ask, said], TOOLS, add_generation_prompt=False)
    assert whole.startswith(prompt)
    answer = whole[len(prompt) :].removesuffix("<|im_end|>\n")
    found = parser_for(None, template).start(prompt, TOOLS).parse(answer)
    assert found.content == content
    assert found.reasoning == said.get("reasoning_content", "").strip("\n")
    assert [json.loads(call.arguments) for call in found.tool_calls] == arguments


def test_reasoning_streams_and_the_tags_newlines_are_dropped() -> None:
    parser = ParserFormat(reasoning=True).start("<|im_start|>assistant\n<think>\n")
    assert parser.push("\nfirst") == [ReasoningDelta("first")]
    assert parser.push("\n</thi") == []
    assert parser.push("s") == [ReasoningDelta("\n</this")]
    assert parser.push("\n</think>\n\nanswer") == [ContentDelta("answer")]
    assert parser.push(" </think>") == [ContentDelta(" </think>")]


def test_reasoning_that_never_ends_and_an_answer_without_any() -> None:
    kind = ParserFormat(reasoning=True)
    assert kind.start("<think>\n").parse("on and on\n") == ParsedMessage("on and on")
    assert kind.start().parse("\n plain\n") == ParsedMessage("", "\n plain\n")
    assert kind.start().parse("<think>\nr\n</think>\n\nc") == ParsedMessage("r", "c")
    assert kind.start("<think>\n\n</think>\n\n").parse("c") == ParsedMessage("", "c")


def test_calls_of_both_formats() -> None:
    for kind, text in (("hermes", HERMES), ("coder_xml", CODER)):
        found = ParserFormat(tools=kind).start("", TOOLS).parse(f"Let me.\n\n{text}\n{text}\n")
        assert found.content == "Let me."
        assert [(c.index, c.name, c.arguments) for c in found.tool_calls] == [
            (0, "f", '{"text": "a"}'),
            (1, "f", '{"text": "a"}'),
        ]


def test_text_stays_text_without_tools() -> None:
    assert ParserFormat(tools="hermes").start("", None).parse(HERMES).content == HERMES


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nno json\n</tool_call>",
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
        '<tool_call>{"name": "f", "arg',
    ],
)
def test_what_is_no_call_stays_content(text: str) -> None:
    assert ParserFormat(tools="hermes").start("", TOOLS).parse(text) == ParsedMessage("", text)


def test_tags_inside_of_values_and_a_missing_closing_tag() -> None:
    hermes = ParserFormat(tools="hermes")
    value = {"text": 'a</tool_call>"<tool_call>\\'}
    text = "<tool_call>" + json.dumps({"name": "f", "arguments": value})
    for end in ("", "</tool_call>"):
        (call,) = hermes.start("", TOOLS).parse(text + end).tool_calls
        assert json.loads(call.arguments) == value
    coder = ParserFormat(tools="coder_xml")
    inner = "x </tool_call>\n</parameter> y"
    text = f"<tool_call>\n<function=f>\n<parameter=text>\n{inner}\n</parameter>\n</function>\n"
    for end in ("", "</tool_call>"):
        (call,) = coder.start("", TOOLS).parse(text + end).tool_calls
        assert json.loads(call.arguments) == {"text": inner}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("text", "12", "12"),
        ("text", "", ""),
        ("text", "a\n\nb", "a\n\nb"),
        ("n", "12", 12),
        ("n", "12.0", 12),
        ("n", "1.5", "1.5"),
        ("n", "true", "true"),
        ("x", "1.5", 1.5),
        ("on", "True", True),
        ("on", "false", False),
        ("items", '[1, "b"]', [1, "b"]),
        ("o", '{"a": null}', {"a": None}),
        ("o", "{broken", "{broken"),
        ("maybe", "None", None),
        ("maybe", "3", 3),
        ("either", "3", "3"),
        ("unknown", "3", "3"),
    ],
)
def test_types_follow_the_schema(name: str, text: str, value: object) -> None:
    body = f"<function=f>\n<parameter={name}>\n{text}\n</parameter>\n</function>"
    parser = ParserFormat(tools="coder_xml").start("", TOOLS)
    (call,) = parser.parse(f"<tool_call>\n{body}\n</tool_call>").tool_calls
    found = json.loads(call.arguments)[name]
    assert (found, type(found)) == (value, type(value))


def test_arguments_that_are_json_text_and_lone_surrogates() -> None:
    parser = ParserFormat(tools="hermes").start("", TOOLS)
    call = json.dumps({"name": "f", "arguments": '{"text": "\\ud800"}'})
    (found,) = parser.parse(f"<tool_call>{call}</tool_call>").tool_calls
    assert found.arguments == '{"text": "\\ud800"}'


def test_the_format_follows_from_the_template(qwen3: Tokenizer) -> None:
    found = {kind: parser_for(qwen3, default_template(kind)) for kind in ("instruct", "coder")}
    assert found == {
        "instruct": ParserFormat(tools="hermes"),
        "coder": ParserFormat(tools="coder_xml"),
    }
    assert parser_for(qwen3, default_template("thinking")) == ParserFormat(True, "hermes")
    assert parser_for(qwen3, ChatTemplate("{{ messages[0].content }}")) == ParserFormat()


def test_a_tokenizer_that_swallows_the_tags_is_refused() -> None:
    from qnext.text.qwen3 import qwen3_tokenizer_from_ranks

    backend = qwen3_tokenizer_from_ranks({bytes([i]): i for i in range(256)})
    backend.add_special_tokens(["<think>"])
    with pytest.raises(TextError, match="marks <think> as special"):
        parser_for(Tokenizer(backend), default_template("thinking"))
