from __future__ import annotations

import math
from typing import Any
from unittest import mock

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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qnext.engine.generate import Engine
from qnext.engine.request import Request
from qnext.engine.sampling_params import SamplingParams
from qnext.errors import RequestError
from qnext.layers.model import CausalLM

LENGTHS = (1, 2, 3, 5, 17, 33, 70)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"max_num_seqs": 1},
    {"max_num_seqs": 3, "max_num_batched_tokens": 7},
    {"max_num_batched_tokens": 1},
    {"max_num_batched_tokens": 64, "max_num_seqs": 4},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_equals_full_forwards_in_every_layout(
    model: CausalLM, layout: dict[str, Any]
) -> None:
    prompts = prompts_of(LENGTHS)
    want = [[greedy_oracle(model, prompt, 12)] for prompt in prompts]
    assert outputs(run(model, prompts, GREEDY, **layout)) == want


def test_sampling_does_not_depend_on_neighbours_layout_or_the_engines_history(
    model: CausalLM,
) -> None:
    prompts = prompts_of(LENGTHS)
    params = [
        SamplingParams(seed=n, max_tokens=10, temperature=0.9, top_k=n % 3 * 8, top_p=0.95)
        for n in range(len(prompts))
    ]
    singles = [outputs(run(model, [p], one))[0] for p, one in zip(prompts, params, strict=True)]
    for layout in LAYOUTS:
        assert outputs(run(model, prompts, params, **layout)) == singles
    assert len({tuple(o) for row in singles for o in row}) == len(prompts)


def test_requests_without_seeds_differ_and_the_engines_seed_repeats_them(model: CausalLM) -> None:
    prompts = prompts_of([5]) * 3
    params = SamplingParams(max_tokens=12, temperature=1.5, ignore_eos=True)
    first = outputs(run(model, prompts, params, seed=1))
    assert first == outputs(run(model, prompts, params, seed=1))
    assert first != outputs(run(model, prompts, params, seed=2))
    assert len({tuple(row[0]) for row in first}) == 3


@pytest.mark.parametrize("layout", [*LAYOUTS, {"max_num_seqs": 2}])
def test_n_completions_are_n_seeds_of_one_prompt(model: CausalLM, layout: dict[str, Any]) -> None:
    params = SamplingParams(n=4, seed=50, max_tokens=8, temperature=1.2)
    prompts = prompts_of([1, 9, 33])
    singles = [
        [outputs(run(model, [p], params.replace(n=1, seed=50 + i)))[0][0] for i in range(4)]
        for p in prompts
    ]
    assert outputs(run(model, prompts, params, **layout)) == singles


def test_one_prefill_serves_all_completions(model: CausalLM) -> None:
    engine = new_engine(model, max_num_seqs=4)
    engine.add_request(prompts_of([30])[0], SamplingParams(n=4, max_tokens=3))
    drain(engine)
    assert engine.stats.num_prefill_steps == 1


def test_a_request_can_join_while_others_run(model: CausalLM) -> None:
    prompts = prompts_of([8, 20, 3])
    want = [greedy_oracle(model, prompt, 12) for prompt in prompts]
    engine = new_engine(model, max_num_seqs=4)
    first = [engine.add_request(prompt, GREEDY) for prompt in prompts[:2]]
    for _ in range(5):
        engine.step()
    late = engine.add_request(prompts[2], GREEDY)
    drain(engine)
    assert [r.sequences[0].output_ids for r in (*first, late)] == want


def test_finish_reasons(model: CausalLM) -> None:
    (prompt,) = prompts_of([6])
    tokens = greedy_oracle(model, prompt, 12)
    place = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
    target = tokens[place]

    def finished(params: SamplingParams, **options: Any) -> tuple[list[int], str | None, Any]:
        (sequence,) = run(model, [prompt], params, **options)[0].sequences
        return sequence.output_ids, sequence.finish_reason, sequence.stop_reason

    assert finished(GREEDY) == (tokens, "length", None)
    stopped = (tokens[: place + 1], "stop")
    assert finished(GREEDY.replace(stop_token_ids=[target])) == (*stopped, target)
    with_eos = GREEDY.replace(ignore_eos=False)
    assert finished(with_eos, eos_token_ids=(target,)) == (*stopped, None)
    assert finished(GREEDY, eos_token_ids=(target,)) == (tokens, "length", None)
    no_limit = GREEDY.replace(max_tokens=None)
    assert finished(no_limit, max_model_len=10) == (tokens[:4], "length", None)
    assert finished(GREEDY, max_model_len=7) == (tokens[:1], "length", None)
    ids, reason, _ = finished(with_eos.replace(min_tokens=12), eos_token_ids=(target,))
    assert (len(ids), reason) == (12, "length")
    assert target not in ids


def test_logprobs_are_those_of_a_full_forward(model: CausalLM) -> None:
    (prompt,) = prompts_of([9])
    params = SamplingParams(
        temperature=0.8, top_k=5, seed=3, max_tokens=8, logprobs=3, ignore_eos=True
    )
    (request,) = run(model, [prompt], params)
    (sequence,) = request.sequences
    want = torch.log_softmax(logits_of(model, sequence.tokens), -1)[len(prompt) - 1 :]
    assert sequence.logprobs is not None
    assert len(sequence.logprobs) == 8
    total = 0.0
    for step, token in enumerate(sequence.output_ids):
        found = sequence.logprobs[step]
        assert next(iter(found)) == token
        assert {*found} == {token, *want[step].topk(3).indices.tolist()}
        for other, entry in found.items():
            assert entry.logprob == pytest.approx(float(want[step, other]), abs=1e-4)
            assert entry.rank == int((want[step] > want[step, other]).sum()) + 1
        total += found[token].logprob
    assert sequence.cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_prompt_logprobs(model: CausalLM, piece: int) -> None:
    prompts = prompts_of([1, 2, 30])
    params = SamplingParams(max_tokens=2, prompt_logprobs=2)
    for request in run(model, prompts, params, max_num_batched_tokens=piece):
        prompt, found = request.prompt_token_ids, request.prompt_logprobs
        assert found is not None
        assert len(found) == len(prompt)
        assert found[0] is None
        want = torch.log_softmax(logits_of(model, prompt), -1)
        for place, entry in enumerate(found[1:], start=1):
            assert entry is not None
            assert entry[prompt[place]].logprob == pytest.approx(
                float(want[place - 1, prompt[place]]), abs=1e-4
            )
            assert len(entry) in (2, 3)


def test_padding_rows_are_never_generated() -> None:
    model = tiny_model(seed=3)
    with torch.no_grad():
        head(model)[VOCAB:] = head(model)[:VOCAB].max() * 10
    params = [
        SamplingParams(seed=1, temperature=2.0, max_tokens=40, ignore_eos=True),
        GREEDY.replace(max_tokens=40),
    ]
    for k in (0, 2):
        requests = run(model, prompts_of([4, 4]), params, num_speculative_tokens=k)
        assert all(max(ids) < VOCAB for (ids,) in outputs(requests))


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_a_damaged_request_fails_alone_and_its_slot_is_clean_again(
    k: int, max_num_seqs: int
) -> None:
    model = tiny_model(seed=1)
    good = prompts_of([5, 11])
    want = [greedy_oracle(model, prompt, 12) for prompt in good]
    used = {1, 2, *(token for row in (*good, *want) for token in row)}
    poison = next(token for token in range(VOCAB) if token not in used)
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = math.nan
    prompts = [good[0], [1, poison, 2], good[1], [poison]]
    requests = run(model, prompts, GREEDY, num_speculative_tokens=k, max_num_seqs=max_num_seqs)
    sequences = [request.sequences[0] for request in requests]
    assert [s.finish_reason for s in sequences] == ["length", "error", "length", "error"]
    assert "not finite" in str(sequences[1].error)
    assert [sequences[0].output_ids, sequences[2].output_ids] == want


@pytest.mark.parametrize("k", [0, 3])
def test_abort_frees_the_slot_and_leaves_neighbours_alone(model: CausalLM, k: int) -> None:
    prompts = prompts_of([8, 20, 3])
    engine = new_engine(model, num_speculative_tokens=k, max_num_seqs=2)
    requests = [engine.add_request(prompt, GREEDY) for prompt in prompts]
    engine.step()
    engine.step()
    engine.abort(requests[0])
    drain(engine)
    assert [r.sequences[0].finish_reason for r in requests] == ["abort", "length", "length"]
    for request, prompt in list(zip(requests, prompts, strict=True))[1:]:
        assert request.sequences[0].output_ids == greedy_oracle(model, prompt, 12)


def test_an_abort_in_the_middle_of_a_step_waits_for_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(seed=2)
    prompts = prompts_of([8, 20, 3])
    want = [greedy_oracle(model, prompt, 12) for prompt in prompts]
    engine = new_engine(model, num_speculative_tokens=2, max_num_seqs=2)
    requests = [engine.add_request(prompt, GREEDY) for prompt in prompts]
    real, calls = model.logits, []

    def aborting(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            engine.abort(requests[0])
        return real(hidden)

    monkeypatch.setattr(model, "logits", aborting)
    drain(engine)
    assert requests[0].sequences[0].finish_reason == "abort"
    assert [r.sequences[0].output_ids for r in requests[1:]] == want[1:]


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 5, 8])
def test_an_interrupt_in_any_step_is_recomputed(
    at: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(seed=2)
    prompts = prompts_of([8, 20])
    params = SamplingParams(
        n=2, seed=4, max_tokens=10, prompt_logprobs=1, frequency_penalty=0.5, ignore_eos=True
    )
    options = {"num_speculative_tokens": k, "max_num_batched_tokens": 16, "max_num_seqs": 3}
    want = outputs(run(model, prompts, params, **options))
    engine = new_engine(model, **options)
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    real, calls = model.logits, []

    def interrupted(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return real(hidden)

    monkeypatch.setattr(model, "logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drain(engine)
    engine.cache.check()
    assert not engine.cache.leases
    drain(engine)
    assert outputs(requests) == want
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.prompt_logprobs is not None
        assert len(request.prompt_logprobs) == len(prompt)


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "empty"),
        ([0] * 200, {}, "max_model_len=200"),
        ([1, VOCAB], {}, "prompt holds 40"),
        ([-1], {}, "prompt holds -1"),
        ([1.0], {}, "1.0"),
        ([True], {}, "True"),
        ([1], {"stop_token_ids": [VOCAB]}, "stop_token_ids holds 40"),
        ([1], {"allowed_token_ids": [99]}, "allowed_token_ids holds 99"),
        ([1], {"logit_bias": {77: 1.0}}, "logit_bias holds 77"),
    ],
)
def test_what_can_never_be_served_is_refused_before_any_state(
    model: CausalLM, prompt: list[Any], params: dict[str, Any], words: str
) -> None:
    engine = new_engine(model)
    with pytest.raises(RequestError, match=words):
        engine.add_request(prompt, SamplingParams(**params))
    assert not engine.has_work
    assert not engine.cache.leases
    assert engine.stats.num_requests == 0


def test_the_cache_grows_with_long_outputs(model: CausalLM) -> None:
    (prompt,) = prompts_of([3])
    params = GREEDY.replace(max_tokens=None)
    want = run(model, [prompt], params, max_model_len=300)[0].sequences[0]
    assert len(want.tokens) == 300
    fast = run(model, [prompt], params, max_model_len=300, num_speculative_tokens=3)[0].sequences[0]
    assert fast.tokens == want.tokens
    assert int(logits_of(model, want.tokens[:-1])[-1].argmax()) == want.tokens[-1]


requests_of_a_schedule = st.lists(
    st.fixed_dictionaries(
        {
            "length": st.sampled_from([1, 2, 5, 13, 31]),
            "joins": st.integers(0, 6),
            "leaves": st.none() | st.none() | st.integers(1, 8),
            "values": st.sampled_from(
                [
                    {"temperature": 0},
                    {"temperature": 0, "repetition_penalty": 1.4, "max_tokens": 9},
                    {"n": 3, "temperature": 1.1, "top_p": 0.9},
                    {"n": 2, "top_k": 4, "prompt_logprobs": 1, "logprobs": 2},
                    {"min_p": 0.05, "frequency_penalty": 0.7, "stop_token_ids": [3, 7, 11]},
                    {"min_tokens": 5, "stop_token_ids": list(range(20)), "logit_bias": {30: 2}},
                ]
            ),
        }
    ),
    min_size=1,
    max_size=5,
)


@settings(
    deadline=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    requests_of_a_schedule,
    st.sampled_from([0, 1, 3]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 7, 64]),
    st.none() | st.integers(1, 12),
)
def test_any_schedule_gives_every_request_what_it_gets_alone(
    model: CausalLM,
    schedule: list[dict[str, Any]],
    drafts: int,
    max_num_seqs: int,
    piece: int,
    fails: int | None,
) -> None:
    """Joins, aborts, a failing step, pieces, few slots, drafts: in any combination."""
    engine = new_engine(
        model,
        num_speculative_tokens=drafts,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=piece,
    )
    found: dict[int, Request] = {}
    for time in range(3000):
        for n, one in enumerate(schedule):
            if one["joins"] == time:
                (prompt,) = prompts_of([one["length"]], seed=n)
                params = SamplingParams(**{"max_tokens": 7, "seed": n, **one["values"]})
                found[n] = engine.add_request(prompt, params)
            if n in found and one["leaves"] == time - one["joins"]:
                engine.abort(found[n])
        if fails == time:
            with mock.patch.object(model, "logits", side_effect=RuntimeError("damaged")):
                if engine.has_work:
                    with pytest.raises(RuntimeError, match="damaged"):
                        step_to_logits(engine)
        elif engine.has_work:
            engine.step()
        elif time > 12:
            break
    assert not engine.has_work
    engine.cache.check()
    assert not engine.cache.leases
    for request in found.values():
        (alone,) = run(model, [request.prompt_token_ids], request.params)
        for got, want in zip(request.sequences, alone.sequences, strict=True):
            if got.finish_reason == "abort":
                assert got.output_ids == want.output_ids[: len(got.output_ids)]
                continue
            assert got.output_ids == want.output_ids
            assert (got.finish_reason, got.stop_reason) == (want.finish_reason, want.stop_reason)
            assert got.cumulative_logprob == pytest.approx(want.cumulative_logprob, abs=1e-4)
        if request.prompt_logprobs is not None and not any(
            s.finish_reason == "abort" for s in request.sequences
        ):
            assert len(request.prompt_logprobs) == len(request.prompt_token_ids)


def step_to_logits(engine: Engine) -> None:
    """Step until the patched model is asked for logits, which a piece of a prompt is not."""
    for _ in range(200):
        engine.step()
