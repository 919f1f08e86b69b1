"""Concurrent callers over one engine thread: answers of the offline engine, aborts, failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from engine_models import VOCAB, prompts_of

from qnext import LLM, SamplingParams
from qnext.checkpoint import save_model
from qnext.engine.async_llm import AsyncLLM
from qnext.errors import EngineError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("tiny")
    save_model(model, path)
    return path


@pytest.fixture
def llm(folder: Any) -> LLM:
    return LLM(folder, skip_tokenizer_init=True, dtype="float32", device="cpu", max_num_seqs=4)


async def collect(deltas: AsyncIterator[Any]) -> list[int]:
    return [token async for delta in deltas for token in delta.token_ids]


def test_concurrent_streams_equal_the_offline_engine(llm: LLM, folder: Any) -> None:
    prompts = [p for n in range(5) for p in prompts_of([3, 20, 41], seed=n)]
    want = [o.token_ids for o in LLM(folder, skip_tokenizer_init=True, dtype="float32",
                                     device="cpu").generate(prompts, GREEDY)]  # fmt: skip

    async def main() -> list[list[int]]:
        engine = AsyncLLM(llm)
        try:
            return await asyncio.gather(*(collect(engine.stream(p, GREEDY)) for p in prompts))
        finally:
            await engine.shutdown()

    assert asyncio.run(main()) == want
    llm.engine.cache.check()
    assert not llm.engine.cache.leases


def test_generate_gives_n_completions_whole(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=6, temperature=1.0, ignore_eos=True)
    want = [c.token_ids for c in llm.generate(prompts_of([9]), params)[0].outputs]

    async def main() -> list[list[int]]:
        engine = AsyncLLM(llm)
        try:
            found = await engine.generate(prompts_of([9])[0], params)
            return [c.token_ids for c in found.outputs]
        finally:
            await engine.shutdown()

    assert asyncio.run(main()) == want


def test_a_closed_iterator_and_a_cancelled_task_free_their_slots(llm: LLM) -> None:
    long = GREEDY.replace(max_tokens=150)

    async def main() -> None:
        engine = AsyncLLM(llm)
        stream = engine.stream(prompts_of([5])[0], long)
        await anext(stream)
        await stream.aclose()
        task = asyncio.create_task(engine.generate(prompts_of([7])[0], long))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        other = await engine.generate(prompts_of([4])[0], GREEDY)
        assert len(other.token_ids) == 12
        assert engine.num_open == 0
        await engine.shutdown()

    asyncio.run(main())
    llm.engine.cache.check()
    assert not llm.engine.cache.leases


def test_what_can_never_be_served_is_refused_and_others_go_on(llm: LLM) -> None:
    async def main() -> None:
        engine = AsyncLLM(llm)
        good = asyncio.create_task(engine.generate(prompts_of([6])[0], GREEDY))
        with pytest.raises(RequestError, match="empty"):
            await engine.generate([], GREEDY)
        with pytest.raises(RequestError, match=f"holds {VOCAB + 99}"):
            await collect(engine.stream([VOCAB + 99], GREEDY))
        assert len((await good).token_ids) == 12
        await engine.shutdown()

    asyncio.run(main())


def test_a_failing_step_tells_everybody_and_the_next_request_is_served(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = llm.model.logits, []

    def failing(hidden: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of paper")
        return real(hidden)

    monkeypatch.setattr(llm.model, "logits", failing)

    async def main() -> None:
        engine = AsyncLLM(llm)
        with pytest.raises(EngineError, match="out of paper"):
            await engine.generate(prompts_of([6])[0], GREEDY)
        assert engine.is_alive
        assert len((await engine.generate(prompts_of([6])[0], GREEDY)).token_ids) == 12
        await engine.shutdown()

    asyncio.run(main())
    assert not llm.engine.cache.leases


def test_an_engine_that_keeps_failing_stops_and_says_so(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(hidden: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(llm.model, "logits", failing)

    async def main() -> None:
        engine = AsyncLLM(llm)
        for _ in range(3):
            with pytest.raises(EngineError):
                await engine.generate(prompts_of([6])[0], GREEDY)
        assert not engine.is_alive
        with pytest.raises(EngineError, match="stopped"):
            await engine.generate(prompts_of([6])[0], GREEDY)

    asyncio.run(main())


@pytest.mark.parametrize("drain", [True, False])
def test_shutdown_drains_or_aborts(llm: LLM, drain: bool) -> None:
    async def main() -> None:
        engine = AsyncLLM(llm)
        long = GREEDY.replace(max_tokens=190)
        task = asyncio.create_task(engine.generate(prompts_of([6])[0], long))
        while not engine.num_open:
            await asyncio.sleep(0.001)
        await engine.shutdown(drain=drain)
        if drain:
            assert len((await task).token_ids) == 190
        else:
            with pytest.raises(EngineError, match="shut"):
                await task
        with pytest.raises(EngineError):
            await engine.generate(prompts_of([6])[0], GREEDY)

    asyncio.run(main())
