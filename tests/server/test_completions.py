"""``/v1/completions`` through OpenAI's client, against a real process with the shipped model."""

from __future__ import annotations

import openai
import pytest
from openai import OpenAI

PROMPT = "A transaction is a sequence of operations that"
MODEL = "qnext-small"


def test_the_model_is_listed_and_found(client: OpenAI):
    [model] = client.models.list().data
    assert (model.id, model.object) == (MODEL, "model")
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as failure:
        client.models.retrieve("gpt-oss")
    assert failure.value.code == "model_not_found"


def test_a_stream_adds_up_to_the_answer_and_its_usage(client: OpenAI):
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "seed": 7}
    whole = client.completions.create(**asked)
    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text != ""
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12


def test_the_seed_repeats_a_text_and_another_gives_another(client: OpenAI):
    def say(seed: int) -> str:
        asked = client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=12, seed=seed, temperature=1.5
        )
        return asked.choices[0].text

    assert say(1) == say(1)
    assert len({say(1), say(2), say(3)}) > 1


def test_a_prompt_that_came_before_is_reported_as_cached(client: OpenAI):
    asked = {"model": MODEL, "prompt": "Locks protect shared data " * 12, "max_tokens": 2}
    client.completions.create(**asked)
    usage = client.completions.create(**asked).usage
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens > 30


def test_several_prompts_and_completions_come_in_order(client: OpenAI):
    prompts = ["The kernel", "A hash table"]
    found = client.completions.create(
        model=MODEL, prompt=prompts, n=2, max_tokens=4, seed=3, echo=True, temperature=1.0
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    starts = [p for p in prompts for _ in range(2)]
    assert all(c.text.startswith(s) for c, s in zip(found.choices, starts, strict=True))
    assert found.choices[0].text != found.choices[1].text
    assert found.usage.completion_tokens == 16


def test_logprobs_and_echo_cover_prompt_and_answer(client: OpenAI):
    """As lm-eval scores: token ids in, one token out, the prompt's own log-probabilities."""
    ids = [40, 41, 42, 43, 44]
    [choice] = client.completions.create(
        model=MODEL, prompt=ids, max_tokens=1, echo=True, logprobs=2, temperature=0
    ).choices
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 6
    assert found.token_logprobs[0] is None
    assert all(value <= 0 for value in found.token_logprobs[1:])
    assert all(len(step) == 2 for step in found.top_logprobs[1:])
    assert max(found.top_logprobs[-1].values()) == found.token_logprobs[-1]  # greedy
    only = client.completions.create(model=MODEL, prompt=ids, max_tokens=0, echo=True, logprobs=2)
    again = only.choices[0].logprobs.token_logprobs
    assert again[1:] == pytest.approx(found.token_logprobs[1:-1], abs=1e-4)
    assert only.usage.completion_tokens == 0


def test_stop_texts_end_an_answer_and_are_left_out(client: OpenAI):
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "seed": 5}
    text = client.completions.create(**asked).choices[0].text
    stop = text[len(text) // 2 :][:3]
    [choice] = client.completions.create(**asked, stop=["never such", stop]).choices
    assert choice.finish_reason == "stop"
    assert choice.text == text[: text.index(stop)]
    assert choice.stop_reason == stop


def test_logit_bias_decides(client: OpenAI):
    [choice] = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=3, logit_bias={"300": 100}, logprobs=0, temperature=0
    ).choices
    assert len(set(choice.logprobs.tokens)) == 1


def test_structured_outputs_hold_for_plain_prompts(client: OpenAI):
    [choice] = client.completions.create(
        model=MODEL, prompt="A number: ", max_tokens=40,
        extra_body={"structured_outputs": {"regex": "[0-9]{4}"}},
    ).choices  # fmt: skip
    assert choice.text.isdigit()
    assert len(choice.text) == 4


@pytest.mark.parametrize(
    ("changes", "says", "param"),
    [
        ({"best_of": 3}, "not ranked", "best_of"),
        ({"suffix": "end"}, "middle", "suffix"),
        ({"n": 5}, "at most 4", "n"),
        ({"temperature": 3}, "less than or equal to 2", "temperature"),
        ({"max_tokens": 0}, "at least 1", "max_tokens"),
        ({"logprobs": 21}, "at most 20", None),
        ({"stop": ["x"] * 17}, "at most 16", "stop"),
        ({"logit_bias": {"x": 1}}, "token ids", "logit_bias"),
        ({"logit_bias": {"9000": 1}}, "token ids are integers", None),
        ({"stream_options": {"include_usage": True}}, "needs stream", "stream_options"),
        ({"extra_body": {"no_such": 1}}, "no such field", "no_such"),
        ({"extra_body": {"structured_outputs": {"regex": "(" * 99}}}, "nested", None),
        ({"prompt": []}, "empty", "prompt"),
        ({"prompt": ""}, "empty", None),
        ({"prompt": [8191, 8192]}, "token ids are integers", None),
        ({"prompt": "x " * 9000}, "do not fit", None),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_reason(client: OpenAI, changes, says, param):
    with pytest.raises(openai.BadRequestError) as failure:
        client.completions.create(**{"model": MODEL, "prompt": "x", **changes})
    assert says in failure.value.message
    assert failure.value.type == "invalid_request_error"
    assert failure.value.param == param
