"""Grammars and thinking budgets through the whole engine: valid, and the same with drafts."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from engine_models import drain, new_engine, tiny_model
from json_schemas import check_json, random_schema

from qnext.engine.generate import Engine
from qnext.engine.grammar import GrammarCompiler
from qnext.engine.llm import LLM
from qnext.engine.request import Request, RequestText, Sequence
from qnext.engine.sampling_params import SamplingParams
from qnext.engine.structured_outputs import StructuredOutputsParams
from qnext.engine.text_stream import TextStream
from qnext.engine.thinking import ThinkTokens
from qnext.errors import RequestError
from qnext.hub import resolve_model
from qnext.layers.model import CausalLM
from qnext.text import Tokenizer

Form = StructuredOutputsParams
EOS, PROMPT = 8185, "The answer as JSON: "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(resolve_model(None))


@pytest.fixture(scope="module")
def wide_model() -> CausalLM:
    """Random weights over the shipped tokenizer's vocabulary."""
    return tiny_model(seed=3, vocab_size=8192)


@pytest.fixture(scope="module")
def add(tokenizer: Tokenizer) -> Callable[..., Request]:
    """Adds a text request to an engine, as LLM does."""
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, [EOS])
    thinking = ThinkTokens.of(tokenizer)

    def added(engine: Engine, prompt: str, params: SamplingParams) -> Request:
        form = params.structured_outputs
        text = RequestText(
            new_stream=partial(TextStream, tokenizer, params),
            grammar=compiler.compile(form) if form else None,
            thinking=thinking,
        )
        return engine.add_request(tokenizer.encode(prompt), params, text=text)

    return added


FEW_BLOCKS = {"block_size": 2, "num_blocks": 110, "max_model_len": 210}


def engine_of(model: CausalLM, **options: Any) -> Engine:
    return new_engine(
        model, **{"vocab_size": 8192, "max_model_len": 500, "eos_token_ids": (EOS,), **options}
    )


def shown(requests: list[Request]) -> list[tuple[list[int], str | None, int | str | None]]:
    sequences = [sequence for request in requests for sequence in request.sequences]
    return [(s.output_ids, s.finish_reason, s.stop_reason) for s in sequences]


def forms(count: int, seed: int) -> list[Form]:
    rng = random.Random(seed)
    fixed = [
        Form(regex="[A-Z][a-z]{1,6}(, [0-9]{1,3}){0,2}"),
        Form(choice=["yes", "no", "perhaps, but…"]),
        Form(grammar='root ::= "(" root ")" | [a-c]'),
    ]
    return fixed + [Form(json=random_schema(rng)) for _ in range(count - len(fixed))]


def check_text(form: Form, text: str) -> None:
    if form.json is not None:
        check_json(text, json.loads(form.json))
    elif form.regex is not None:
        assert re.fullmatch(form.regex, text)
    elif form.choice is not None:
        assert text in form.choice
    else:
        assert re.fullmatch(r"\(*[a-c]\)*", text)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_answer_has_its_form_and_is_the_same_under_every_schedule(
    wide_model: CausalLM, add: Callable[..., Request], seed: int, temperature: float
) -> None:
    every = forms(24, seed)
    engines = [
        engine_of(wide_model),
        engine_of(wide_model, num_speculative_tokens=1),
        engine_of(wide_model, num_speculative_tokens=4, max_num_seqs=5),
        engine_of(wide_model, num_speculative_tokens=3, max_num_batched_tokens=7),
        engine_of(wide_model, num_speculative_tokens=2, draft_override=spoiled),
        # blocks for a few of them: the others give way
        engine_of(wide_model, num_speculative_tokens=2, preemption="recompute", **FEW_BLOCKS),
        engine_of(
            wide_model,
            num_speculative_tokens=1,
            preemption="swap",
            enable_prefix_caching=False,
            **FEW_BLOCKS,
        ),
    ]
    results = []
    for engine in engines:
        requests = []
        for n, form in enumerate(every):
            params = SamplingParams(
                temperature=temperature, seed=n, max_tokens=200, structured_outputs=form
            )
            requests.append(add(engine, PROMPT, params))
        drain(engine)
        results.append(shown(requests))
        for form, request in zip(every, requests, strict=True):
            (sequence,) = request.sequences
            assert sequence.finish_reason == "stop", (form, sequence.error)
            assert sequence.text is not None
            check_text(form, sequence.text.text)
    assert all(result == results[0] for result in results[1:])
    assert engines[-2].stats.num_preempted > 0
    assert engines[-1].stats.num_swapped > 0


def spoiled(sequence: Sequence, drafts: list[int]) -> list[int]:
    """Wrong in turn at each place, with tokens that the grammar mostly forbids."""
    place = len(sequence.output_ids) % (len(drafts) + 1)
    return [(d + 13) % 8192 if n == place else d for n, d in enumerate(drafts)]


def test_no_draft_breaks_the_grammar(wide_model: CausalLM, add: Callable[..., Request]) -> None:
    engine = engine_of(wide_model, num_speculative_tokens=4, draft_override=spoiled_never)
    for n, form in enumerate(forms(16, 5)):
        add(engine, PROMPT, SamplingParams(seed=n, max_tokens=200, structured_outputs=form))
    drain(engine)
    assert sum(engine.stats.num_drafted) > 50


def spoiled_never(sequence: Sequence, drafts: list[int]) -> list[int]:
    constraint = sequence.sampling.constraint
    assert constraint is not None
    for place, token in enumerate(drafts):
        rule = constraint.rule(sequence.output_ids, drafts[:place])
        if rule.allowed is None or token == EOS:
            break
        assert rule.allowed[token >> 5] >> (token & 31) & 1
    return drafts


@pytest.mark.parametrize("k", [0, 3])
def test_completions_of_one_prompt_have_grammars_of_their_own(
    wide_model: CausalLM, add: Callable[..., Request], k: int
) -> None:
    engine = engine_of(wide_model, num_speculative_tokens=k)
    form = Form(json={"type": "array", "items": {"type": "integer"}, "maxItems": 4})
    request = add(
        engine, PROMPT, SamplingParams(n=6, seed=3, max_tokens=200, structured_outputs=form)
    )
    drain(engine)
    texts = {sequence.text.text for sequence in request.sequences if sequence.text}
    assert len(texts) > 3
    for text in texts:
        check_text(form, text)


@pytest.mark.parametrize("k", [0, 2])
def test_min_tokens_gives_way_only_where_the_text_must_end(
    wide_model: CausalLM, add: Callable[..., Request], k: int
) -> None:
    engine = engine_of(wide_model, num_speculative_tokens=k)
    short = SamplingParams(
        temperature=0, min_tokens=20, max_tokens=40, structured_outputs=Form(choice=["yes"])
    )
    long = short.replace(structured_outputs=Form(regex="(ab)*"))
    first, second = add(engine, PROMPT, short), add(engine, PROMPT, long)
    drain(engine)
    assert first.sequences[0].finish_reason == "stop"
    assert first.sequences[0].text is not None
    assert first.sequences[0].text.text == "yes"
    assert len(second.sequences[0].output_ids) >= 20
    assert second.sequences[0].text is not None
    assert re.fullmatch("(ab)*a?", second.sequences[0].text.text)


def test_options_that_leave_no_token_fail_their_request_alone(
    wide_model: CausalLM, add: Callable[..., Request]
) -> None:
    engine = engine_of(wide_model)
    form = Form(choice=["yes"])
    bad = add(engine, PROMPT, SamplingParams(allowed_token_ids=[5], structured_outputs=form))
    good = add(engine, PROMPT, SamplingParams(structured_outputs=form))
    drain(engine)
    assert bad.sequences[0].finish_reason == "error"
    assert bad.sequences[0].error == "the parameters together allow no token"
    assert not bad.sequences[0].poisoned
    assert good.sequences[0].finish_reason == "stop"


# Thinking


def thinking_run(
    model: CausalLM, add: Callable[..., Request], budget: int | None, **values: Any
) -> list[Request]:
    options = values.pop("options", {})
    engine = engine_of(model, **options)
    params = SamplingParams(
        **{"max_tokens": 30, "ignore_eos": True, "max_thinking_tokens": budget, **values}
    )
    prompts = ["Why?<think>\n", "Why?<think>\nSince", "Why?"]
    requests = [add(engine, prompt, params.replace(seed=n)) for n, prompt in enumerate(prompts)]
    drain(engine)
    return requests


@pytest.mark.parametrize("budget", [0, 1, 5, 12])
@pytest.mark.parametrize("values", [{"temperature": 0}, {"repetition_penalty": 1.3}])
def test_the_budget_is_kept_and_the_rest_is_untouched(
    wide_model: CausalLM,
    tokenizer: Tokenizer,
    add: Callable[..., Request],
    budget: int,
    values: dict[str, Any],
) -> None:
    close = tokenizer.encode("</think>\n\n")
    free = thinking_run(wide_model, add, None, **values)
    kept = thinking_run(wide_model, add, budget, **values)
    for before, after in zip(free[:2], kept[:2], strict=True):
        ids = after.sequences[0].output_ids
        assert close[0] not in before.sequences[0].output_ids[:budget]
        assert ids[:budget] == before.sequences[0].output_ids[:budget]
        assert ids[budget : budget + len(close)] == close
    assert shown(free[2:]) == shown(kept[2:])  # nothing to close
    for k in (1, 4):
        fast = thinking_run(
            wide_model, add, budget, options={"num_speculative_tokens": k}, **values
        )
        assert shown(fast) == shown(kept)


def test_after_the_forced_close_the_model_goes_on_from_that_text(
    wide_model: CausalLM, tokenizer: Tokenizer, add: Callable[..., Request]
) -> None:
    kept = thinking_run(wide_model, add, 4, temperature=0)[0].sequences[0].output_ids
    start = tokenizer.encode("Why?<think>\n")
    size = 4 + len(tokenizer.encode("</think>\n\n"))
    engine = engine_of(wide_model)
    params = SamplingParams(temperature=0, max_tokens=30 - size, ignore_eos=True)
    request = engine.add_request([*start, *kept[:size]], params)
    drain(engine)
    assert request.sequences[0].output_ids == kept[size:]


@pytest.mark.parametrize("k", [0, 1, 4])
def test_an_answer_after_thinking_has_its_form(
    wide_model: CausalLM, tokenizer: Tokenizer, add: Callable[..., Request], k: int
) -> None:
    """The block closes by budget or among accepted drafts; then, and only then, the grammar."""
    end = tokenizer.encode("</think>\n\n")
    truth = thinking_run(
        wide_model, add, 7, structured_outputs=Form(choice=["no", "yes"]), ignore_eos=False
    )

    def right(sequence: Sequence, drafts: list[int]) -> list[int]:
        outputs = [
            r.sequences[0].output_ids
            for r in truth
            if r.prompt_token_ids == sequence.tokens[: sequence.num_prompt]
        ]
        done = len(sequence.output_ids)
        return outputs[0][done : done + len(drafts)]

    for override in (None, right, spoiled):
        options = {"num_speculative_tokens": k, "draft_override": override}
        found = thinking_run(
            wide_model,
            add,
            7,
            structured_outputs=Form(choice=["no", "yes"]),
            ignore_eos=False,
            options=options,
        )
        assert shown(found) == shown(truth)
        for request in found:
            (sequence,) = request.sequences
            assert sequence.finish_reason == "stop"
            assert sequence.text is not None
            assert re.sub("(?s).*</think>\n\n", "", sequence.text.text) in ("no", "yes")
        assert all(found[n].sequences[0].output_ids[7 : 7 + len(end)] == end for n in (0, 1))


# Through LLM, with the shipped model


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(num_speculative_tokens=3)


def test_the_shipped_model_answers_in_form_and_the_same_without_drafts(llm: LLM) -> None:
    rng = random.Random(11)
    schemas = [random_schema(rng) for _ in range(10)]
    params = [
        SamplingParams(temperature=0.8, seed=n, max_tokens=300, structured_outputs={"json": schema})
        for n, schema in enumerate(schemas)
    ]
    fast = llm.generate([PROMPT] * len(params), params)
    assert sum(llm.stats.num_accepted) > 20
    for schema, output in zip(schemas, fast, strict=True):
        assert output.finish_reason == "stop"
        check_json(output.text, schema)
    plain = LLM(num_speculative_tokens=0).generate([PROMPT] * len(params), params)
    assert [output.token_ids for output in plain] == [output.token_ids for output in fast]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"structured_outputs": {"regex": "(a"}}, "regex cannot be used"),
        ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
        ({"guided_decoding": {"json": "{"}}, "no JSON"),
        ({"structured_outputs": {"choice": ["a"]}, "ignore_eos": True}, "never end"),
        ({"max_thinking_tokens": -1}, "max_thinking_tokens"),
        ({"truncate_prompt_tokens": 0}, "no prompt"),
    ],
)
def test_bad_forms_are_refused_before_anything_runs(
    llm: LLM, values: dict[str, Any], words: str
) -> None:
    before = llm.stats.num_requests
    with pytest.raises(RequestError, match=words):
        llm.generate(["a", "b"], [SamplingParams(), SamplingParams(**values)])
    assert llm.stats.num_requests == before


def test_without_a_tokenizer_forms_and_budgets_are_refused() -> None:
    llm = LLM(skip_tokenizer_init=True)
    with pytest.raises(RequestError, match="structured_outputs needs a tokenizer"):
        llm.generate([[1, 2]], SamplingParams(structured_outputs=Form(choice=["a"])))
    with pytest.raises(RequestError, match="max_thinking_tokens needs a tokenizer"):
        llm.generate([[1, 2]], SamplingParams(max_thinking_tokens=3))


def test_streaming_and_stop_texts_see_forced_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, max_thinking_tokens=6)
    prompt = "What is a file?<think>\nA file"
    whole = llm.generate(prompt, params)[0]
    assert "".join(delta.text for delta in llm.stream(prompt, params)) == whole.text
    assert whole.text.count("</think>\n\n") == 1
    stopped = llm.generate(prompt, params.replace(stop="</think>"))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text.split("</think>")[0]


def test_truncate_prompt_tokens_keeps_the_end(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    ids = list(range(20, 60))
    cut = llm.generate([ids], params.replace(truncate_prompt_tokens=7))[0]
    assert cut.prompt_token_ids == ids[-7:]
    assert cut.token_ids == llm.generate([ids[-7:]], params)[0].token_ids
    longest = [5] * (llm.max_model_len + 50)
    with pytest.raises(RequestError, match="max_model_len"):
        llm.generate([longest], params)
