from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from engine_models import (
    VOCAB,
    drain,
    greedy_oracle,
    head,
    logits_of,
    new_engine,
    outputs,
    prompts_of,
    run,
    tiny_model,
)

from qnext.engine.request import Sequence
from qnext.engine.sampler import probs
from qnext.engine.sampling_params import SamplingParams
from qnext.engine.sampling_state import Row, SamplingState
from qnext.engine.speculative import resolve_num_drafts
from qnext.errors import ConfigError
from qnext.layers.model import CausalLM
from qnext.layers.packed import PackedBatch

LENGTHS = (1, 2, 7, 19, 40)
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"max_num_seqs": 2},
    {"max_num_seqs": 3, "max_num_batched_tokens": 5},
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_greedy_text_is_that_of_plain_decoding(
    model: CausalLM, k: int, layout: dict[str, Any]
) -> None:
    prompts = prompts_of(LENGTHS)
    want = outputs(run(model, prompts, GREEDY))
    assert outputs(run(model, prompts, GREEDY, num_speculative_tokens=k, **layout)) == want


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_forced_rejections_at_every_position_change_nothing(model: CausalLM, k: int) -> None:
    prompts = prompts_of(LENGTHS)
    truth = {tuple(prompt): greedy_oracle(model, prompt, 16) for prompt in prompts}
    want = [[truth[tuple(prompt)]] for prompt in prompts]
    for wrong in range(k + 1):

        def override(sequence: Sequence, drafts: list[int], wrong: int = wrong) -> list[int]:
            done = len(sequence.output_ids)
            right = truth[tuple(sequence.tokens[: sequence.num_prompt])][done : done + len(drafts)]
            if wrong < len(right):
                right[wrong] = (right[wrong] + 1) % VOCAB
            return right

        engine = new_engine(model, num_speculative_tokens=k, draft_override=override)
        requests = [engine.add_request(prompt, GREEDY) for prompt in prompts]
        drain(engine)
        assert outputs(requests) == want
        rates = engine.stats.acceptance_per_position
        assert rates[:wrong] == pytest.approx([1.0] * wrong, abs=0.3)
        assert rates[wrong:] == [0.0] * (k - wrong)
        if wrong == k:  # nothing refused: k + 1 tokens per step
            assert engine.stats.num_decode_steps == math.ceil(15 / (k + 1))
            assert engine.stats.num_accepted == engine.stats.num_drafted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drafts_are_those_of_an_mtp_run_over_the_verified_text(
    model: CausalLM, layout: dict[str, Any]
) -> None:
    seen: list[tuple[list[int], list[int]]] = []

    def record(sequence: Sequence, drafts: list[int]) -> list[int]:
        seen.append((list(sequence.tokens), drafts))
        return drafts

    params = SamplingParams(n=2, seed=1, temperature=0.7, max_tokens=9, ignore_eos=True)
    options = {"num_speculative_tokens": 3, "draft_override": record, **layout}
    run(model, prompts_of([1, 6, 13]), params, **options)
    assert len(seen) > 20
    for tokens, drafts in seen:
        assert drafts == naive_drafts(model, tokens, len(drafts))


@torch.inference_mode()
def naive_drafts(model: CausalLM, tokens: list[int], count: int) -> list[int]:
    """Spec 6.2 without a cache: the whole MTP sequence again for every draft."""
    assert model.mtp is not None
    known = len(tokens) - 1
    hidden = model.hidden_states(torch.tensor(tokens[:-1]), PackedBatch.of([known]))
    next_ids, drafts = tokens[1:], []
    for _ in range(count):
        batch = PackedBatch.of([len(next_ids)])
        out = model.draft_states(hidden, torch.tensor(next_ids), batch)
        drafts.append(int(model.logits(out[-1:])[0, :VOCAB].argmax()))
        hidden = torch.cat([hidden, out[-1:]])
        next_ids = [*next_ids, drafts[-1]]
    return drafts


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.02},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
        {"logit_bias": {3: 2.0}, "min_tokens": 6, "stop_token_ids": [3]},
        {"temperature": 0, "repetition_penalty": 1.5, "n": 1},
    ],
)
def test_a_seed_gives_the_same_text_with_and_without_drafts(
    model: CausalLM, k: int, values: dict[str, Any]
) -> None:
    params = SamplingParams(**{"n": 2, "seed": 8, "max_tokens": 14, "logprobs": 1, **values})
    prompts = prompts_of(LENGTHS)
    plain = run(model, prompts, params)
    fast = run(model, prompts, params, num_speculative_tokens=k)
    assert outputs(fast) == outputs(plain)
    for one, other in zip(plain, fast, strict=True):
        for a, b in zip(one.sequences, other.sequences, strict=True):
            assert a.finish_reason == b.finish_reason
            assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-4)


@pytest.mark.parametrize("source", ["mtp", "likely"])
def test_sampling_with_drafts_follows_the_exact_distribution(source: str) -> None:
    """Chi-square over all triples of five tokens; "likely" forces many accepted drafts."""
    model, vocab, prompt, count = tiny_model(seed=5), 5, [1, 2, 3], 2000
    values: dict[str, Any] = {"temperature": 1.3, "top_p": 0.95, "presence_penalty": 0.3}
    expected: dict[tuple[int, ...], float] = {}

    def distribution(output: tuple[int, ...]) -> list[float]:
        state = SamplingState(SamplingParams(**values), prompt_ids=prompt, vocab_size=vocab, seed=0)
        for token in output:
            state.append(token)
        logits = logits_of(model, [*prompt, *output])[-1:, :vocab] / 4
        return probs(logits, [Row(state)])[0].tolist()

    memo = {
        output: distribution(output)
        for length in range(3)
        for output in itertools.product(range(vocab), repeat=length)
    }
    for triple in itertools.product(range(vocab), repeat=3):
        expected[triple] = math.prod(memo[triple[:i]][triple[i]] for i in range(3))
    assert sum(expected.values()) == pytest.approx(1)

    def likely(sequence: Sequence, drafts: list[int]) -> list[int]:
        output = tuple(sequence.output_ids)
        for _ in drafts:
            row = memo[output]
            output = (*output, row.index(max(row)))
        return list(output[-len(drafts) :])

    with torch.no_grad():
        head(model).div_(4)
    engine = new_engine(
        model,
        vocab_size=vocab,
        num_speculative_tokens=2,
        max_num_seqs=256,
        draft_override=likely if source == "likely" else None,
    )
    params = SamplingParams(n=count, seed=7, max_tokens=3, **values)
    request = engine.add_request(prompt, params)
    drain(engine)
    if source == "likely":
        assert engine.stats.acceptance_per_position[0] > 0.2
    counts = dict.fromkeys(expected, 0)
    for sequence in request.sequences:
        counts[tuple(sequence.output_ids)] += 1
    chi_square, cells, rest = 0.0, 0, [0.0, 0.0]
    for triple, share in expected.items():
        if share * count < 5:
            rest[0] += share * count
            rest[1] += counts[triple]
            continue
        chi_square += (counts[triple] - share * count) ** 2 / (share * count)
        cells += 1
    if rest[0] > 5:
        chi_square += (rest[1] - rest[0]) ** 2 / rest[0]
    else:
        assert rest[1] < 25
    assert cells > 10
    # Wilson-Hilferty: about four standard deviations above the mean.
    limit = cells * (1 - 2 / (9 * cells) + 4 * math.sqrt(2 / (9 * cells))) ** 3
    assert chi_square < limit


@pytest.mark.parametrize("k", [2, 4])
def test_a_stop_among_accepted_drafts_ends_there(model: CausalLM, k: int) -> None:
    (prompt,) = prompts_of([6])
    tokens = greedy_oracle(model, prompt, 16)

    def right(sequence: Sequence, drafts: list[int]) -> list[int]:
        done = len(sequence.output_ids)
        return tokens[done : done + len(drafts)]

    for place, token in enumerate(tokens):
        if token in tokens[:place]:
            continue
        params = GREEDY.replace(stop_token_ids=[token])
        options = {"num_speculative_tokens": k, "draft_override": right}
        (sequence,) = run(model, [prompt], params, **options)[0].sequences
        assert sequence.output_ids == tokens[: place + 1]
        assert sequence.stop_reason == token


def test_damaged_mtp_weights_cost_acceptance_and_nothing_else() -> None:
    model = tiny_model(seed=4)
    prompts = prompts_of(LENGTHS)
    want = outputs(run(model, prompts, GREEDY))
    assert model.mtp is not None
    with torch.no_grad():
        model.mtp.fc.weight.fill_(math.nan)
    assert outputs(run(model, prompts, GREEDY, num_speculative_tokens=2)) == want


def test_num_speculative_tokens() -> None:
    assert resolve_num_drafts(None, has_mtp=True) == 0
    assert resolve_num_drafts("auto", has_mtp=False) == 0
    assert resolve_num_drafts("auto", has_mtp=True) > 0
    assert resolve_num_drafts(8, has_mtp=True) == 8
    for bad in (-1, 9, 1.5, True, "many"):
        with pytest.raises(ConfigError, match="num_speculative_tokens"):
            resolve_num_drafts(bad, has_mtp=True)
    with pytest.raises(ConfigError, match="MTP"):
        resolve_num_drafts(1, has_mtp=False)
