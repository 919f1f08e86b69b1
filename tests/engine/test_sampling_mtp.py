"""Chi-square of sampling with drafts against the exact distribution, for every sampling setting."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import sampling_oracle as oracle
import torch
from engine_models import drain, head, logits_of, new_engine, tiny_model

from qnext.engine.request import RequestText, Sequence
from qnext.engine.sampling_params import SamplingParams
from qnext.layers.model import CausalLM

VOCAB, PROMPT, LENGTH, COUNT = 5, [1, 2, 3], 3, 1200
BAD_WORDS = ((2, 0), (4, 4))

SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.3},
    "top_k": {"top_k": 3, "temperature": 1.5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "all filters": {"temperature": 1.4, "top_k": 4, "top_p": 0.95, "min_p": 0.05},
    "penalties": {
        "repetition_penalty": 1.4,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "temperature": 1.2,
    },
    "bias": {"logit_bias": {0: 1.0, 3: -1.0}},
    "allowed": {"allowed_token_ids": [0, 2, 4]},
    "bad words": {"bad_words": ["x"]},
    "stops": {"stop_token_ids": [2, 4], "min_tokens": 2},
}


@pytest.fixture(scope="module")
def flat_model() -> CausalLM:
    model = tiny_model(seed=5)
    with torch.no_grad():
        head(model).div_(4)
    return model


class Exact:
    """Probabilities of whole outputs, from forwards without a cache."""

    def __init__(self, model: CausalLM, values: dict[str, Any]) -> None:
        self.values, self.stops = values, values.get("stop_token_ids", ())
        self.next: dict[tuple[int, ...], dict[int, float]] = {}
        self.outputs: dict[tuple[int, ...], float] = {}
        self._walk(model, (), 1.0)

    def _walk(self, model: CausalLM, output: tuple[int, ...], share: float) -> None:
        ended = (
            bool(output)
            and output[-1] in self.stops
            and len(output) >= self.values.get("min_tokens", 0)
        )
        if len(output) == LENGTH or ended:
            self.outputs[output] = share
            return
        logits = logits_of(model, [*PROMPT, *output], VOCAB)[-1].tolist()
        row = oracle.final_logits(
            logits,
            self.values,
            prompt=PROMPT,
            output=output,
            stops=self.stops,
            bad_words=BAD_WORDS if "bad_words" in self.values else (),
        )
        self.next[output] = oracle.distribution(row, self.values)
        for token, chance in self.next[output].items():
            self._walk(model, (*output, token), share * chance)

    def drafts(self, output: tuple[int, ...], count: int, index: int) -> list[int]:
        """The likeliest tokens, but a wrong one for every fourth sequence at each place."""
        found: list[int] = []
        for _ in range(count):
            here = (*output, *found)
            shares = self.next.get(here, {0: 1.0})
            wrong = (index + len(here)) % 4 == 0
            found.append((max(shares, key=lambda t: shares[t]) + wrong) % VOCAB)
        return found


@pytest.mark.parametrize("seed", [7, 100_007])
@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_with_drafts_follow_the_exact_distribution(
    flat_model: CausalLM, name: str, seed: int
) -> None:
    values = SETTINGS[name]
    exact = Exact(flat_model, values)
    assert sum(exact.outputs.values()) == pytest.approx(1)
    counts, accepted = sampled(flat_model, values, exact, seed)
    assert accepted > 0.2
    check(counts, exact.outputs)


def sampled(
    model: CausalLM, values: dict[str, Any], exact: Exact, seed: int
) -> tuple[Counter[tuple[int, ...]], float]:
    def override(sequence: Sequence, drafts: list[int]) -> list[int]:
        return exact.drafts(tuple(sequence.output_ids), len(drafts), sequence.index)

    engine = new_engine(
        model,
        vocab_size=VOCAB,
        num_speculative_tokens=2,
        max_num_seqs=256,
        draft_override=override,
    )
    params = SamplingParams(n=COUNT, seed=seed, max_tokens=LENGTH, **values)
    text = RequestText(bad_words=BAD_WORDS if "bad_words" in values else ())
    request = engine.add_request(PROMPT, params, text=text)
    drain(engine)
    found = Counter(tuple(sequence.output_ids) for sequence in request.sequences)
    return found, engine.stats.acceptance_per_position[0]


def check(counts: Counter[tuple[int, ...]], want: dict[tuple[int, ...], float]) -> None:
    """Fails for an output of probability 0 and for p < 1e-4."""
    total = sum(counts.values())
    assert total == COUNT
    assert all(want.get(output, 0.0) > 0 for output in counts)
    chi, cells, rest, seen = 0.0, 0, 0.0, 0
    for output, share in want.items():
        if share * total < 5:
            rest += share * total
            seen += counts[output]
            continue
        chi += (counts[output] - share * total) ** 2 / (share * total)
        cells += 1
    if rest >= 5:
        chi += (seen - rest) ** 2 / rest
    freedom = cells - (rest < 5)
    assert freedom >= 5
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi < limit, (chi, limit)


def test_the_check_sees_drafts_that_are_accepted_too_easily(flat_model: CausalLM) -> None:
    """Outputs in which one in five takes its drafts unseen must fail."""
    values = SETTINGS["temperature"]
    exact = Exact(flat_model, values)
    counts, _ = sampled(flat_model, values, exact, seed=7)
    spoiled: Counter[tuple[int, ...]] = Counter()
    for n, output in enumerate(counts.elements()):
        easy = (output[0], *exact.drafts(output[:1], 2, 1))
        spoiled[easy if n % 5 == 0 else output] += 1
    with pytest.raises(AssertionError):
        check(spoiled, exact.outputs)
