"""Needles: the prompt is what it says, the verdict is the model's greedy text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qnext import load_model
from qnext.errors import RequestError
from qnext.hub import resolve_model
from qnext.layers.model import CausalLM
from qnext.text import Tokenizer
from qnext.train.needle import FILLER, _judge, _prompt, find_needles


@pytest.fixture(scope="module")
def shipped() -> tuple[CausalLM, Tokenizer]:
    folder = resolve_model(None)
    return load_model(folder, dtype="float32", device="cpu"), Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_prompt_holds_the_fact_once_and_asks_for_it(shipped, depth) -> None:  # type: ignore[no-untyped-def]
    _, tokenizer = shipped
    ids, answer = _prompt(tokenizer, tokenizer.encode(FILLER), 160, depth, np.random.default_rng(0))
    assert len(ids) == 160
    text = tokenizer.decode(ids)
    number = tokenizer.decode(ids[-answer:])
    assert number.strip().isdigit()
    assert text.count(number) == 2
    assert text.count("The secret number of") == 2
    at = text.index(number) / len(text)
    assert abs(at - depth) < 0.25


def test_the_shipped_model_remembers_and_an_empty_one_does_not(shipped) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = shipped
    places = find_needles(model, tokenizer, [96, 160], depths=(0.5, 1.0), trials=3)
    assert [(p.length, p.depth) for p in places] == [(96, 0.5), (96, 1.0), (160, 0.5), (160, 1.0)]
    assert sum(p.found for p in places) / 4 >= 0.5
    saved = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    blank = find_needles(model, tokenizer, [96], depths=(0.5,), trials=3)
    with torch.no_grad():
        for p, old in zip(model.parameters(), saved, strict=True):
            p.copy_(old)
    assert blank[0].found == 0
    assert blank[0].nats == pytest.approx(np.log(model.config.vocab_size), rel=1e-3)


def test_the_verdict_is_the_greedy_continuation(shipped) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = shipped
    hay = tokenizer.encode(FILLER)
    for seed in range(3):
        ids, answer = _prompt(tokenizer, hay, 120, 0.3, np.random.default_rng(seed))
        text = ids[:-answer]
        with torch.no_grad():
            for _ in range(answer):
                text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
            assert _judge(model, ids, answer)[0] == (text == ids)


def test_lengths_that_cannot_be_are_refused(shipped) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = shipped
    with pytest.raises(RequestError, match="has no room for the needle"):
        find_needles(model, tokenizer, [10])
    with pytest.raises(RequestError, match="more than the model's context 8192"):
        find_needles(model, tokenizer, [9000])
