from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.engine.sampling_params import MAX_N, SamplingParams
from qnext.errors import RequestError


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)
    assert (params.min_p, params.repetition_penalty, params.logprobs) == (0.0, 1.0, None)
    assert params.skip_special_tokens
    assert params.detokenize
    assert not params.greedy
    assert SamplingParams(temperature=0).greedy


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("n", 0, "n >= 1 and n <= 16384"),
        ("n", MAX_N + 1, "n <= 16384"),
        ("n", True, "integer"),
        ("n", 1.5, "integer"),
        ("temperature", -0.1, "temperature >= 0"),
        ("temperature", math.nan, "finite"),
        ("temperature", math.inf, "finite"),
        ("temperature", "1", "number"),
        ("top_p", 0, "top_p > 0 and top_p <= 1"),
        ("top_p", 1.1, "top_p <= 1"),
        ("top_k", -2, "top_k >= -1"),
        ("min_p", 1.01, "min_p <= 1"),
        ("presence_penalty", 2.1, "presence_penalty <= 2"),
        ("frequency_penalty", -2.1, "frequency_penalty >= -2"),
        ("repetition_penalty", 0, "repetition_penalty > 0"),
        ("max_tokens", 0, "max_tokens >= 1"),
        ("min_tokens", -1, "min_tokens >= 0"),
        ("logprobs", -2, "logprobs >= -1"),
        ("stop", 3, "list"),
        ("stop_token_ids", ["a"], "integer"),
        ("seed", "x", "integer"),
    ],
)
def test_a_wrong_value_names_field_value_and_range(name: str, value: object, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    text = f"{caught.value} {caught.value.hint}"
    assert name in text
    assert words in text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"n": 2, "temperature": 0}, "greedy"),
        ({"min_tokens": 17}, "max_tokens=16"),
        ({"stop": "x", "detokenize": False}, "detokenize"),
        ({"stop": ["a", ""]}, "empty"),
        ({"allowed_token_ids": []}, "at least one"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
    ],
)
def test_contradictions_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        SamplingParams(**values)


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(RequestError, match="'temprature'") as caught:
        SamplingParams(temprature=1.0)
    assert caught.value.hint == "did you mean 'temperature'?"
    with pytest.raises(RequestError) as caught:
        SamplingParams(zzzz=1)
    assert "top_p" in str(caught.value.hint)


def test_values_are_normalised_as_in_vllm() -> None:
    params = SamplingParams(stop="a", seed=-1, top_k=-1, logprobs=True, logit_bias={3: 1000})
    assert params.stop == ("a",)
    assert params.seed is None
    assert params.top_k == 0
    assert params.logprobs == 1
    assert params.logit_bias == {3: 100.0}
    assert SamplingParams(seed=np.int64(7), temperature=np.float32(0.5)).seed == 7


def test_params_are_frozen_and_replace_checks_again() -> None:
    params = SamplingParams(temperature=0.5, stop=["x"])
    with pytest.raises(Exception, match="frozen"):
        params.temperature = 1.0
    changed = params.replace(top_p=0.5)
    assert (changed.temperature, changed.top_p, changed.stop) == (0.5, 0.5, ("x",))
    with pytest.raises(RequestError):
        params.replace(top_p=2.0)


@given(st.floats(), st.integers(), st.floats())
def test_any_numbers_are_accepted_or_refused_by_a_request_error(
    temperature: float, top_k: int, top_p: float
) -> None:
    try:
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    except RequestError:
        return
    assert params.temperature >= 0
    assert params.top_k >= 0
    assert 0 < params.top_p <= 1
