"""Every option of the sampler with every other against a slow oracle, and chi-square."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import sampling_oracle as oracle
import torch

from qnext.engine.sampler import Sampler, probs
from qnext.engine.sampling_params import SamplingParams
from qnext.engine.sampling_state import Row, SamplingState

VOCAB = 23
STOPS = (4, 9)
PROMPT = [1, 2, 2, 8]
OUTPUT = [3, 5, 3]
BAD_WORDS = [[7], [3, 6], [5, 3, 10], [11, 12, 13]]

OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.4},
    {"temperature": 1.9},
    {"top_k": 1},
    {"top_k": 6},
    {"top_k": 500},
    {"top_p": 0.35},
    {"top_p": 0.92},
    {"min_p": 0.2},
    {"repetition_penalty": 1.6},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.8},
    {"logit_bias": {3: 4.0, 0: -2.0}},
    {"allowed_token_ids": [0, 3, 4, 5, 10, 11, 17]},
    {"min_tokens": 5, "stop_token_ids": list(STOPS)},
    {"bad_words": ["x"]},
    {"logprobs": 4},
]


def state_of(values: dict[str, Any], seed: int) -> SamplingState:
    params = SamplingParams(**values)
    state = SamplingState(
        params,
        prompt_ids=PROMPT,
        stop_ids=STOPS,
        vocab_size=VOCAB,
        seed=seed,
        bad_words=BAD_WORDS if params.bad_words else (),
    )
    for token in OUTPUT:
        state.append(token)
    return state


def pairs() -> list[dict[str, Any]]:
    joined = [{**a, **b} for a, b in itertools.combinations(OPTIONS, 2)]
    return [{}, *OPTIONS, *joined]


def test_every_pair_of_options_draws_the_token_of_the_oracle_in_one_mixed_batch() -> None:
    """All pairs are rows of one batch, each with up to two drafts, so neighbours differ in all."""
    rows: list[Row] = []
    every: list[tuple[dict[str, Any], int, tuple[int, ...]]] = []
    for seed, values in enumerate(pairs()):
        state = state_of(values, seed)
        for drafts in ((), (5,), (11, 12)):
            rows.append(Row(state, drafts))
            every.append((values, seed, drafts))
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    sampled = Sampler(VOCAB)(logits, rows)
    found = probs(logits, rows)
    near = 0
    for n, (values, seed, drafts) in enumerate(every):
        output = [*OUTPUT, *drafts]
        final = oracle.final_logits(
            logits[n].tolist(),
            values,
            prompt=PROMPT,
            output=output,
            stops=STOPS,
            bad_words=BAD_WORDS if values.get("bad_words") else (),
        )
        want = oracle.distribution(final, values)
        dense = torch.tensor([want.get(token, 0.0) for token in range(VOCAB)])
        torch.testing.assert_close(found[n], dense, atol=3e-6, rtol=1e-4, msg=str(values))
        token, distance = oracle.drawn(want, oracle.uniform(seed, len(output)))
        near += distance < 1e-6
        assert sampled.tokens[n] == token or distance < 1e-6, (values, drafts)
        assert sampled.valid[n]
        raw = sampled.logprobs[n]
        assert (raw is None) == ("logprobs" not in values)
        if raw is not None:
            exact = torch.log_softmax(logits[n].double(), -1)
            assert raw.token_ids[0] == token
            for one, value, rank in zip(*raw, strict=True):
                assert value == pytest.approx(float(exact[one]), abs=1e-5)
                assert rank == 1 + int((logits[n] > logits[n, one]).sum())
    assert near <= 2  # the tolerance must not hide anything


def test_rows_do_not_depend_on_their_neighbours_order_or_number() -> None:
    states = [state_of(values, seed) for seed, values in enumerate(pairs())]
    logits = torch.randn(len(states), VOCAB, generator=torch.Generator().manual_seed(4)) * 2
    together = Sampler(VOCAB).sample(logits, states).tokens
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(5)).tolist()
    sampler = Sampler(VOCAB)
    for size in (1, 7, len(order)):
        for first in range(0, len(order), size):
            some = order[first : first + size]
            again = sampler.sample(logits[some], [states[n] for n in some]).tokens
            assert again == [together[n] for n in some]


@pytest.mark.parametrize("values", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_samples_follow_the_oracle_by_chi_square(values: dict[str, Any], seed: int) -> None:
    """6,000 sequences of one token; fails for p < 1e-4 and for any token of probability 0."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed))
    extra = {} if values.get("temperature") == 0.0 or "top_k" in values else {"temperature": 1.2}
    values = {**extra, **values}
    final = oracle.final_logits(
        logits[0].tolist(),
        values,
        prompt=PROMPT,
        output=OUTPUT,
        stops=STOPS,
        bad_words=BAD_WORDS if values.get("bad_words") else (),
    )
    want = oracle.distribution(final, values)
    count, counts = 6000, [0] * VOCAB
    states = [state_of(values, 1000 * seed + n) for n in range(300)]
    sampler = Sampler(VOCAB)
    for _ in range(count // len(states)):
        for token in sampler.sample(logits.expand(len(states), -1), states).tokens:
            counts[token] += 1
        for state in states:  # another number of the same sequence, the same distribution
            state.output_ids.append(0)
        if any(name in values for name in CHANGING):
            states = [state_of(values, 10**6 * seed + sum(counts) + n) for n in range(300)]
    check_chi_square(counts, want, count)


CHANGING = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "bad_words",
)
"""Options that look at the output: a sequence then gives one sample only."""


def check_chi_square(counts: list[int], want: dict[int, float], count: int) -> None:
    assert sum(counts) == count
    assert all(want.get(token, 0.0) > 0 for token, seen in enumerate(counts) if seen)
    cells = {token: share for token, share in want.items() if share * count >= 5}
    chi = sum((counts[t] - count * p) ** 2 / (count * p) for t, p in cells.items())
    rest = count * (1 - sum(cells.values()))
    if rest >= 5:
        seen = count - sum(counts[t] for t in cells)
        chi += (seen - rest) ** 2 / rest
    freedom = len(cells) - (rest < 5)
    if freedom == 0:
        return
    # Wilson-Hilferty: 3.72 standard deviations, p = 1e-4.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi < limit, (chi, limit)


def test_the_chi_square_test_sees_a_slightly_wrong_distribution() -> None:
    """The same check on samples of a temperature 8 % too high must fail."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    want = oracle.distribution(logits[0].tolist(), {"temperature": 1.0})
    states = [state_of({"temperature": 1.08}, n) for n in range(6000)]
    counts = [0] * VOCAB
    for token in Sampler(VOCAB).sample(logits.expand(6000, -1), states).tokens:
        counts[token] += 1
    with pytest.raises(AssertionError):
        check_chi_square(counts, want, 6000)
