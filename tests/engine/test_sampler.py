from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.engine.sampler import Sampler, probs, process_logits, top_logprobs
from qnext.engine.sampling_params import SamplingParams
from qnext.engine.sampling_state import Row, SamplingState

VOCAB = 12


def make(
    prompt: list[int] | None = None, output: list[int] | None = None, **values: Any
) -> SamplingState:
    stop_ids = values.pop("eos", [])
    bad_words = values.pop("bad", [])
    values.setdefault("seed", 0)
    params = SamplingParams(**values)
    state = SamplingState(
        params,
        prompt_ids=prompt or [],
        stop_ids=stop_ids,
        vocab_size=VOCAB,
        seed=params.seed or 0,
        bad_words=bad_words,
    )
    for token in output or []:
        state.append(token)
    return state


def naive_probs(logits: list[float], params: SamplingParams) -> list[float]:
    """Temperature, min_p, top_k, top_p by the book, one row of Python floats."""
    if params.greedy:
        best = max(range(len(logits)), key=lambda i: logits[i])
        return [float(i == best) for i in range(len(logits))]
    scaled = [x / params.temperature for x in logits]
    top = max(scaled)
    weights = [math.exp(x - top) for x in scaled]
    weights = [w if w >= params.min_p else 0.0 for w in weights]
    order = sorted(range(len(weights)), key=lambda i: -scaled[i])
    for place, i in enumerate(order):
        if params.top_k and place >= params.top_k:
            weights[i] = 0.0
    total, before = sum(weights), 0.0
    for place, i in enumerate(order):
        share = weights[i] / total
        if place and before >= params.top_p:
            weights[i] = 0.0
        before += share
    return [w / sum(weights) for w in weights]


settings_of_rows = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 3, 7, 50]),
        "top_p": st.sampled_from([0.1, 0.53, 0.97, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5]),
    }
)


@settings(deadline=None, max_examples=60)
@given(st.lists(settings_of_rows, min_size=1, max_size=6), st.integers(0, 10**6))
def test_probs_of_mixed_rows_equal_a_naive_formula(rows: list[dict[str, Any]], seed: int) -> None:
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    states = [make(**row) for row in rows]
    got = probs(logits, [Row(state) for state in states])
    for row, state in enumerate(states):
        want = torch.tensor(naive_probs(logits[row].tolist(), state.params))
        torch.testing.assert_close(got[row], want, atol=2e-6, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.lists(settings_of_rows, min_size=1, max_size=6), st.integers(0, 10**6))
def test_neighbours_do_not_change_a_sample(rows: list[dict[str, Any]], seed: int) -> None:
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    sampler = Sampler(VOCAB)
    alone = [
        sampler(logits[i : i + 1], [Row(make(seed=i + 1, **row))]).tokens[0]
        for i, row in enumerate(rows)
    ]
    states = [make(seed=i + 1, **row) for i, row in enumerate(rows)]
    assert sampler(logits, [Row(state) for state in states]).tokens == alone


def test_penalties_equal_a_naive_formula_with_drafts_counted() -> None:
    prompt, output, drafts = [1, 2, 2], [3, 3, 4], (4, 5)
    state = make(
        prompt,
        output,
        repetition_penalty=1.7,
        presence_penalty=0.4,
        frequency_penalty=-0.3,
        logit_bias={0: 2.5, 3: -1.0},
    )
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    got = process_logits(logits, [Row(state, drafts)])[0]
    counts = Counter([*output, *drafts])
    for token in range(VOCAB):
        value = float(logits[0, token]) + {0: 2.5, 3: -1.0}.get(token, 0.0)
        if token in counts or token in prompt:
            value = value / 1.7 if value > 0 else value * 1.7
        value -= -0.3 * counts[token] + 0.4 * (token in counts)
        assert float(got[token]) == pytest.approx(value, abs=1e-6)
    assert torch.equal(logits, before)


def test_masks() -> None:
    logits = torch.zeros(1, VOCAB)

    def banned(state: SamplingState, drafts: tuple[int, ...] = ()) -> set[int]:
        row = process_logits(logits, [Row(state, drafts)])[0]
        return set(torch.nonzero(torch.isinf(row)).flatten().tolist())

    assert banned(make(allowed_token_ids=[2, 5])) == set(range(VOCAB)) - {2, 5}
    early = make(output=[1], min_tokens=3, eos=[7, 8])
    assert banned(early) == {7, 8}
    assert banned(early, (1,)) == {7, 8}
    assert banned(early, (1, 1)) == set()
    words = make(output=[1], bad=[[9], [1, 2], [1, 3, 4]])
    assert banned(words) == {9, 2}
    assert banned(words, (3,)) == {9, 4}
    assert banned(words, (0,)) == {9}


def test_padding_rows_are_never_sampled() -> None:
    logits = torch.zeros(3, VOCAB + 4)
    logits[:, VOCAB:] = 50.0
    logits[1, VOCAB + 1] = math.nan
    states = [make(temperature=0), make(temperature=1.0, seed=1), make(top_k=3, seed=2)]
    sampled = Sampler(VOCAB)(logits, [Row(state) for state in states])
    assert all(token < VOCAB for token in sampled.tokens)
    assert sampled.valid == [True] * 3


def test_ids_without_a_token_are_never_sampled() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, 3] = 50.0
    logits[2, 7] = math.nan
    sampler = Sampler(VOCAB, unused_ids=[3])
    greedy = make(temperature=0)
    assert sampler(logits[:1], [Row(greedy)]).tokens == [0]
    sampled = sampler(logits, [Row(greedy), Row(make(seed=2, logprobs=1)), Row(make())])
    assert 3 not in sampled.tokens
    assert sampled.valid == [True, True, False]
    assert sampled.logprobs[1] is not None
    assert sampled.logprobs[1].logprobs[0] == pytest.approx(-math.log(VOCAB - 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_not_finite_fails_its_row_alone(bad: float, temperature: float) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    clean = Sampler(VOCAB)(logits, [Row(make(temperature=temperature)) for _ in range(3)])
    logits[1, 4] = bad
    sampled = Sampler(VOCAB)(logits, [Row(make(temperature=temperature)) for _ in range(3)])
    assert sampled.valid == [True, False, True]
    assert [sampled.tokens[0], sampled.tokens[2]] == [clean.tokens[0], clean.tokens[2]]
    assert Sampler(VOCAB)(logits[1:2], [Row(make(temperature=temperature))]).valid == [False]


def test_a_row_without_any_allowed_token_is_not_valid() -> None:
    state = make(allowed_token_ids=[3], min_tokens=1, eos=[3])
    sampled = Sampler(VOCAB)(torch.zeros(2, VOCAB), [Row(state), Row(make(seed=4))])
    assert sampled.valid == [False, True]


def test_logprobs_are_log_softmax_of_the_raw_logits() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(3))
    want = torch.log_softmax(logits, -1)
    state = make(temperature=0.2, logprobs=3, logit_bias={11: 100.0})
    sampled = Sampler(VOCAB)(logits[:1], [Row(state)])
    raw = sampled.logprobs[0]
    assert raw is not None
    assert sampled.tokens == [11]
    assert raw.token_ids[0] == 11
    order = want[0].argsort(descending=True).tolist()
    expected = [11, *(token for token in order[:3] if token != 11)]
    assert raw.token_ids == expected
    for token, value, rank in zip(*raw, strict=True):
        assert value == pytest.approx(float(want[0, token]), abs=1e-6)
        assert rank == order.index(token) + 1
    everything = top_logprobs(logits, torch.tensor([0, 1, 2, 3]), [-1, 0, 2, 50])
    assert [len(raw.token_ids) for raw in everything[:2]] == [VOCAB, 1]
    assert sum(map(math.exp, everything[0].logprobs)) == pytest.approx(1, abs=1e-5)


def test_a_seed_repeats_and_drafts_do_not_shift_the_numbers() -> None:
    plain, ahead = make(seed=9), make(seed=9)
    looked = [ahead.draw(2), ahead.draw(0), ahead.draw(1)]
    drawn = []
    for token in (1, 2, 3):
        drawn.append(plain.draw(0))
        plain.append(token)
    assert drawn == [looked[1], looked[2], looked[0]]
    ahead.append(1)
    assert ahead.draw(0) == drawn[1]
    assert make(seed=10).draw(0) != drawn[0]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.8},
        {"min_p": 0.1, "logit_bias": {3: 2.0}},
    ],
)
def test_samples_follow_probs_by_chi_square(values: dict[str, Any]) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(5))
    state = make(seed=123, **values)
    want = probs(logits, [Row(state)])[0].double()
    count, counts = 4000, torch.zeros(VOCAB, dtype=torch.float64)
    sampler = Sampler(VOCAB)
    for _ in range(count // 500):
        rows = [Row(state, (0,) * place) for place in range(500)]
        for token in sampler(logits.expand(500, -1), rows).tokens:
            counts[token] += 1
        for _ in range(500):
            state.append(0)
    assert counts[want == 0].sum() == 0
    kept = want > 0
    chi_square = ((counts[kept] - count * want[kept]) ** 2 / (count * want[kept])).sum()
    assert float(chi_square) < 40  # 11 degrees of freedom: p = 3e-5


@pytest.mark.parametrize("values", [{"top_p": 0.9}, {"min_p": 0.01}, {"min_p": 1e-4, "top_p": 0.9}])
def test_a_large_vocabulary_is_sorted_only_as_far_as_needed(values: dict[str, Any]) -> None:
    """A peaked row ends within the first tokens, a flat one needs the whole vocabulary."""
    vocab = 2000
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(2))
    logits[0] *= 8
    logits[2] *= 0.1
    params = SamplingParams(**values)
    states = [SamplingState(params, vocab_size=vocab, seed=n) for n in range(3)]
    got = probs(logits, [Row(state) for state in states])
    for row in range(3):
        want = torch.tensor(naive_probs(logits[row].tolist(), params))
        torch.testing.assert_close(got[row], want, atol=1e-5, rtol=1e-3)
    tokens = Sampler(vocab)(logits, [Row(state) for state in states]).tokens
    assert all(float(got[row, token]) > 0 for row, token in enumerate(tokens))


def test_functions_of_the_user_see_output_drafts_and_masks() -> None:
    seen: list[tuple[list[int], list[float]]] = []

    def only_next(ids: list[int], row: torch.Tensor) -> torch.Tensor:
        seen.append((list(ids), row.tolist()))
        wanted = torch.full_like(row, -math.inf)
        wanted[len(ids)] = 0
        return wanted

    state = make(output=[4, 4], logits_processors=[only_next], logit_bias={1: 2.0}, seed=1)
    rows = [Row(state), Row(state, (7,)), Row(make(temperature=0, logit_bias={5: 1.0}))]
    assert Sampler(VOCAB)(torch.zeros(3, VOCAB), rows).tokens == [2, 3, 5]
    assert [ids for ids, _ in seen] == [[4, 4], [4, 4, 7]]
    assert seen[0][1] == [2.0 if token == 1 else 0.0 for token in range(VOCAB)]


@pytest.mark.parametrize("bad", ["raises", "shape", "nan"])
def test_a_function_of_the_user_that_fails_fails_its_row_alone(bad: str) -> None:
    def function(ids: list[int], row: torch.Tensor) -> torch.Tensor:
        if bad == "raises":
            raise KeyError("mine")
        return row[:3] if bad == "shape" else row * math.nan

    broken = make(logits_processors=function)
    sampled = Sampler(VOCAB)(torch.zeros(2, VOCAB), [Row(broken), Row(make(seed=3))])
    assert sampled.valid == [False, True]
    assert sampled.finite == [True, True]
    assert bad == "nan" or "logits processor" in str(broken.failure)


def test_tokens_may_stay_on_the_device() -> None:
    """`draw` and `settle` give what `sample` gives, also where a flat row needs a full sort."""
    vocab = 3000
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(0))
    logits[::2] *= 20
    params = [SamplingParams(top_p=0.9), SamplingParams(min_p=1e-4, logprobs=1), SamplingParams()]
    states = [SamplingState(params[n % 3], vocab_size=vocab, seed=n) for n in range(40)]
    want = Sampler(vocab).sample(logits, states)
    draws = Sampler(vocab).draw(logits, states)
    assert not all(bool(retry.enough.all()) for retry in draws.retries)
    draws.settle()
    assert draws.tokens.tolist() == want.tokens
    assert draws.valid.all()
    assert draws.host() == want
