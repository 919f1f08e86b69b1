"""Every pair of features at once, concurrently: each request gets what it gets alone.

The oracle is a plain engine that runs one request: no prefix cache, no drafts, one piece a prompt,
room for everything. Tokens must be equal, log-probabilities agree to 1e-4, in the worst request.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import pytest
from engine_models import new_engine, prompts_of, tiny_model

from qnext.checkpoint import load_model
from qnext.engine.generate import Engine
from qnext.engine.grammar import GrammarCompiler
from qnext.engine.request import Request, RequestText
from qnext.engine.sampling_params import SamplingParams, StructuredOutputsParams
from qnext.hub import shipped_model
from qnext.layers.fused import fuse
from qnext.text import Tokenizer

GRAMMARS = (
    StructuredOutputsParams(regex="[a-z]{2,9}( [a-z]{2,9}){1,3}"),
    StructuredOutputsParams(choice=["the kernel", "the database", "nothing at all"]),
    StructuredOutputsParams(
        json={"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    ),
)
WORDS = (
    "The kernel keeps a list of all processes that are waiting for a resource. When the resource "
    "is free, the first process of the list is woken up and goes on. A process that waits for "
    "more than one resource at the same time may wait forever, which is called a deadlock. "
)

BASE = {"enable_prefix_caching": False, "max_model_len": 160, "max_num_seqs": 8}
ROOM = {"max_model_len": 88, "num_blocks": 13, "block_size": 8}


@dataclass
class Plan:
    """What a combination of features does to a run."""

    options: dict[str, Any] = field(default_factory=dict)
    params: list[Callable[[SamplingParams], SamplingParams]] = field(default_factory=list)
    aborts: bool = False
    shown: list[Callable[[Engine], object]] = field(default_factory=list)


def _options(**options: Any) -> Callable[[Plan], None]:
    return lambda plan: plan.options.update(options)


def _cache(plan: Plan) -> None:
    plan.options["enable_prefix_caching"] = True
    plan.shown.append(lambda engine: engine.cache.stats.tokens_hit)


def _drafts(k: int) -> Callable[[Plan], None]:
    def use(plan: Plan) -> None:
        plan.options["num_speculative_tokens"] = k
        plan.shown.append(lambda engine: sum(engine.stats.num_accepted))

    return use


def _crowded(mode: str) -> Callable[[Plan], None]:
    def use(plan: Plan) -> None:
        plan.options |= {**ROOM, "preemption": mode}
        plan.shown.append(lambda engine: engine.stats.num_preempted)
        if mode == "swap":
            plan.shown.append(lambda engine: engine.stats.num_swapped)

    return use


def _aborts(plan: Plan) -> None:
    plan.aborts = True


def _fork(plan: Plan) -> None:
    plan.params.append(lambda p: p if p.greedy else p.replace(n=3))


def _logprobs(plan: Plan) -> None:
    plan.params.append(lambda p: p.replace(logprobs=3, prompt_logprobs=None if p.greedy else 1))


def _grammar(plan: Plan) -> None:
    plan.params.append(
        lambda p: p.replace(structured_outputs=GRAMMARS[(p.seed or 0) // 2 % 3], ignore_eos=False)
    )


FEATURES: dict[str, Callable[[Plan], None]] = {
    "prefix cache": _cache,
    "1 draft": _drafts(1),
    "3 drafts": _drafts(3),
    "5 drafts": _drafts(5),
    "pieces of 1": _options(max_num_batched_tokens=1),
    "pieces of 7": _options(max_num_batched_tokens=7),
    "pieces of 64": _options(max_num_batched_tokens=64),
    "preemption by recomputing": _crowded("recompute"),
    "preemption by swapping": _crowded("swap"),
    "aborted neighbours": _aborts,
    "several completions": _fork,
    "log-probabilities": _logprobs,
    "grammars": _grammar,
}
EXCLUSIVE = ("draft", "pieces", "preemption")


def plan_of(names: Iterable[str]) -> Plan:
    plan = Plan()
    for name in names:
        FEATURES[name](plan)
    return plan


ALL = ("prefix cache", "3 drafts", "pieces of 7", "aborted neighbours", "several completions")


class Subject:
    """A model, twelve prompts for it (many with a common beginning, or equal), and its grammars.

    Args:
        shipped: the model in the box, or a tiny random one.
    """

    def __init__(self, shipped: bool) -> None:
        lengths = (1, 3, 9, 17, 2, 30, 5, 12)
        self.compiler: GrammarCompiler | None = None
        self.options: dict[str, Any] = {}
        if shipped:
            self.model = load_model(dtype="float32", device="cpu")
            fuse(self.model)
            tokenizer = Tokenizer.from_pretrained(shipped_model())
            eos = tuple(tokenizer.eos_token_ids)
            self.options = {"vocab_size": tokenizer.vocab_size, "eos_token_ids": eos}
            self.compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, eos)
            ids = tokenizer.encode(WORDS * 3)
            long, other = ids[:60], ids[7:52]
            tails = [ids[60 + n : 60 + 2 * n] for n in lengths]
        else:
            self.model = tiny_model(seed=1)
            long, other = prompts_of([60, 45], seed=3)
            tails = prompts_of(lengths, seed=4)
        self.prompts = [long + tails[0], long + tails[1], long[:33] + tails[2], other, other]
        self.prompts += [tails[3], tails[4], long[:20], other[:16] + tails[5], long, *tails[6:]]
        self.alone: dict[tuple[Any, ...], Any] = {}

    def requests(self, rng: random.Random) -> list[tuple[list[int], SamplingParams]]:
        """Prompts and parameters in random order; greedy and seeded sampling."""
        greedy = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
        params = [
            greedy.replace(seed=n) if n % 2 else greedy.replace(seed=n, temperature=0.9, top_k=10)
            for n in range(len(self.prompts))
        ]
        found = list(zip(self.prompts, params, strict=True))
        rng.shuffle(found)
        return found

    def engine(self, **options: Any) -> Engine:
        """An engine over the model."""
        return new_engine(self.model, **{**BASE, **self.options, **options})

    def add(self, engine: Engine, prompt: list[int], params: SamplingParams) -> Request:
        """Queue a request with its compiled grammar."""
        asked = params.structured_outputs
        text = None
        if asked is not None and self.compiler is not None:
            text = RequestText(grammar=self.compiler.compile(asked))
        return engine.add_request(prompt, params, text=text)

    def oracle(self, prompt: list[int], params: SamplingParams) -> Any:
        """Tokens and log-probabilities of a request that has a plain engine for itself."""
        key = (tuple(prompt), repr(params))
        if key not in self.alone:
            engine = self.engine()
            request = self.add(engine, prompt, params)
            while engine.has_work:
                engine.step()
            self.alone[key] = result(request)
        return self.alone[key]


@pytest.fixture(scope="module")
def tiny() -> Subject:
    return Subject(shipped=False)


@pytest.fixture(scope="module")
def shipped() -> Subject:
    return Subject(shipped=True)


def result(request: Request) -> Any:
    return [(s.output_ids, s.logprobs, s.finish_reason) for s in request.sequences], (
        request.prompt_logprobs
    )


def assert_same(found: Any, want: Any) -> None:
    for (ids, logprobs, reason), (want_ids, want_logprobs, want_reason) in zip(
        found[0], want[0], strict=True
    ):
        assert ids == want_ids
        assert reason == want_reason
        assert_close(logprobs, want_logprobs)
    assert_close(found[1], want[1])


def assert_close(found: Any, want: Any) -> None:
    assert (found is None) == (want is None)
    for a, b in zip(found or (), want or (), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert next(iter(a)) == next(iter(b))
            for token in a.keys() & b.keys():
                assert abs(a[token].logprob - b[token].logprob) < 1e-4


def run(subject: Subject, names: Iterable[str], seed: int) -> None:
    """A random schedule under the features: requests come and go while others run."""
    plan, rng = plan_of(names), random.Random(seed)
    engine = subject.engine(**{"check_interval": 3, "full_checks": True, **plan.options})
    todo = subject.requests(rng)
    rush = 0.9 if "num_blocks" in plan.options else 0.4
    running: list[tuple[Request, list[int], SamplingParams]] = []
    neighbours: list[Request] = []
    while todo or engine.has_work:
        while todo and rng.random() < rush:
            prompt, params = todo.pop()
            for change in plan.params:
                params = change(params)
            running.append((subject.add(engine, prompt, params), prompt, params))
            if plan.aborts:
                more = params.replace(max_tokens=60)
                neighbours.append(subject.add(engine, prompt + prompt[:3], more))
        engine.step()
        if neighbours and rng.random() < 0.3:
            engine.abort(neighbours.pop(rng.randrange(len(neighbours))))
        if not todo and all(request.finished for request, *_ in running):
            for request in neighbours:
                engine.abort(request)
    for request, prompt, params in running:
        assert_same(result(request), subject.oracle(prompt, params))
    engine.cache.check()
    assert not engine.cache.leases
    for shown in plan.shown:
        assert shown(engine)


def pairs(*, grammars: bool) -> list[tuple[str, str]]:
    """Pairs that can be had together; those with grammars need a tokenizer."""
    return [
        pair
        for pair in combinations(FEATURES, 2)
        if grammars == ("grammars" in pair)
        and not any(all(word in name for name in pair) for word in EXCLUSIVE)
    ]


@pytest.mark.parametrize("pair", pairs(grammars=False), ids=" x ".join)
def test_every_pair_of_features(tiny: Subject, pair: tuple[str, str]) -> None:
    run(tiny, pair, seed=31 * len(pair[0]) + len(pair[1]))


@pytest.mark.parametrize("pair", pairs(grammars=True), ids=" x ".join)
def test_every_feature_with_grammars(shipped: Subject, pair: tuple[str, str]) -> None:
    run(shipped, pair, seed=len(pair[0]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", ["recomputing", "swapping"])
def test_everything_at_once(tiny: Subject, mode: str, seed: int) -> None:
    run(tiny, (*ALL, f"preemption by {mode}", "log-probabilities"), seed)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_everything_at_once_on_the_shipped_model(shipped: Subject, k: int) -> None:
    drafts = "1 draft" if k == 1 else f"{k} drafts"
    names = (drafts, *(name for name in ALL if "draft" not in name), "preemption by swapping")
    run(shipped, (*names, "log-probabilities"), seed=k)
    run(shipped, (*names, "grammars"), seed=k)
