"""``deterministic``: tokens and logprobs are bitwise those of the request alone."""

from __future__ import annotations

from typing import Any

import pytest
from engine_models import drain, new_engine, prompts_of, run, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.engine.llm import LLM
from qnext.engine.request import Request
from qnext.engine.sampling_params import SamplingParams
from qnext.errors import ConfigError
from qnext.layers.invariant import make_invariant
from qnext.layers.model import CausalLM

GREEDY = SamplingParams(temperature=0, max_tokens=24, logprobs=3, prompt_logprobs=2,
                        ignore_eos=True, detokenize=False)  # fmt: skip
SEEDED = [GREEDY.replace(temperature=0.9, seed=n, top_k=7 * (n % 2), prompt_logprobs=None)
          for n in range(4)]  # fmt: skip
PROMPTS = prompts_of((3, 40, 40, 75), seed=3)
PROMPTS[2] = PROMPTS[1][:30] + PROMPTS[2][30:]  # a shared prefix


@pytest.fixture(scope="module")
def strict() -> CausalLM:
    model = tiny_model(7)
    make_invariant(model)
    return model


@pytest.fixture(scope="module")
def alone(strict: CausalLM) -> list[Any]:
    return [bits(run(strict, [p], GREEDY, enable_prefix_caching=False)[0]) for p in PROMPTS]


def bits(request: Request) -> Any:
    """Everything that came out, exactly."""
    steps = [
        (sequence.output_ids, [
            {token: (one.logprob, one.rank) for token, one in step.items()}
            for step in sequence.logprobs or []
        ])
        for sequence in request.sequences
    ]  # fmt: skip
    prompt = [
        step and {token: one.logprob for token, one in step.items()}
        for step in request.prompt_logprobs or []
    ]
    return steps, prompt


options = st.fixed_dictionaries(
    {
        "max_num_batched_tokens": st.sampled_from([5, 7, 64, 2048]),
        "num_speculative_tokens": st.sampled_from([0, 1, 3, 5]),
        "enable_prefix_caching": st.booleans(),
        "max_num_seqs": st.sampled_from([1, 2, 8]),
        "block_size": st.sampled_from([4, 16]),
        "preemption": st.sampled_from(["recompute", "swap"]),
        "tight": st.booleans(),
    }
)


@settings(max_examples=14)
@given(options, st.permutations(range(4)), st.integers(0, 6))
def test_company_pieces_cache_drafts_and_preemption_change_no_bit(
    strict: CausalLM, alone: list[Any], chosen: dict[str, Any], order: list[int], head_start: int
) -> None:
    tight = chosen.pop("tight")
    if tight:  # fewer blocks than all of them need: somebody gives way
        chosen |= {"max_model_len": 110, "num_blocks": 128 // chosen["block_size"]}
    engine = new_engine(strict, **chosen)
    for _ in range(2):  # the second time with a warm cache
        requests = {}
        for n in order:
            requests[n] = engine.add_request(PROMPTS[n], GREEDY)
            for _ in range(head_start):
                engine.step()
        drain(engine)
        for n, request in requests.items():
            assert bits(request) == alone[n]


def test_seeded_sampling_in_company(strict: CausalLM) -> None:
    each = [bits(run(strict, [p], one)[0]) for p, one in zip(PROMPTS, SEEDED, strict=True)]
    together = run(strict, PROMPTS, SEEDED, max_num_batched_tokens=9)
    assert [bits(request) for request in together] == each


def test_the_promise_is_not_empty() -> None:
    """The usual layers give other last bits to other pieces: the comparison above can fail."""
    model = tiny_model(7)
    long = prompts_of((170,), seed=5)
    one = bits(run(model, long, GREEDY, enable_prefix_caching=False)[0])
    other = bits(run(model, long, GREEDY, enable_prefix_caching=False, max_num_batched_tokens=5)[0])
    assert one != other


def test_the_shipped_model_in_deterministic_mode() -> None:
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=1)
    texts = ["A transaction is", "The kernel keeps a list of", "A transaction is atomic when"]
    strict = LLM(deterministic=True, device="cpu", num_speculative_tokens=2)
    plain = LLM(deterministic=True, device="cpu", enable_prefix_caching=False,
                max_num_batched_tokens=3)  # fmt: skip
    together = strict.generate(texts, params)
    again = strict.generate(texts, params)
    for n, text in enumerate(texts):
        [single] = plain.generate(text, params)
        for result in (together[n], again[n]):
            assert result.token_ids == single.token_ids
            assert result.outputs[0].logprobs == single.outputs[0].logprobs
    assert strict.model.fused is None


def test_a_state_that_rounds_is_no_option() -> None:
    with pytest.raises(ConfigError, match="float16"):
        LLM(deterministic=True, device="cpu", dtype="float16")
