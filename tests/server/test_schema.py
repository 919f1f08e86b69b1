"""No field of the OpenAI API is left undecided."""

from __future__ import annotations

from typing import get_type_hints

import pytest
from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat
from pydantic import ValidationError

from qnext.server.errors import validation_refusal
from qnext.server.schema import ChatBody, CompletionBody

HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("body", "params"), [(ChatBody, chat), (CompletionBody, completion)], ids=["chat", "text"]
)
def test_every_field_is_honoured_or_refused_with_a_reason(body, params, repository):
    theirs = {*get_type_hints(params.CompletionCreateParamsBase), "stream"}
    honoured, refused = set(body.model_fields), set(body.refused)
    assert theirs <= honoured | refused
    assert not honoured & refused
    document = (repository / "docs/serving.md").read_text(encoding="utf-8")
    assert [name for name in honoured | refused if f"`{name}`" not in document] == []


@pytest.mark.parametrize("name", sorted(ChatBody.refused))
def test_a_refused_field_says_why_and_its_neutral_values_pass(name):
    row = ChatBody.refused[name]
    for value in (None, *row.neutral):
        ChatBody.model_validate({"messages": HI, name: value})
    with pytest.raises(ValidationError) as failure:
        ChatBody.model_validate({"messages": HI, name: "something else"})
    refusal = validation_refusal(failure.value.errors())
    assert row.reason in str(refusal)
    assert refusal.param == name


def test_errors_do_not_repeat_the_body():
    with pytest.raises(ValidationError) as failure:
        ChatBody.model_validate({"messages": HI, "temperature": "a secret"})
    assert "secret" not in str(validation_refusal(failure.value.errors()))
