"""How the engine holds out: an abort storm, and a soak with the traffic of agents.

Both compare every finished answer with that of a plain engine (no cache, no drafts, one request
at a time), check the cache's books all along, and watch the process's memory.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from qnext.bench.load import prompts_of
from qnext.bench.peer import PROMPTS, machine
from qnext.engine.llm import LLM
from qnext.engine.request import Request
from qnext.engine.sampling_params import SamplingParams
from qnext.errors import EngineError

Progress = Callable[[str], None]


@dataclass
class Memory:
    """Resident bytes of this process over time."""

    samples: list[int] = field(default_factory=list)

    def sample(self) -> None:
        """Take one."""
        with open("/proc/self/statm", encoding="ascii") as file:
            self.samples.append(int(file.read().split()[1]) * 4096)

    @property
    def growth(self) -> float:
        """Mean of the last quarter over that of the second: 1 is flat."""
        quarter = max(1, len(self.samples) // 4)
        late, early = self.samples[-quarter:], self.samples[quarter : 2 * quarter]
        return (sum(late) / len(late)) / (sum(early) / len(early)) if early else 1.0


def storm(
    model: str | None = None,
    *,
    requests: int = 10_000,
    seed: int = 0,
    say: Progress = lambda line: None,
    **options: Any,
) -> dict[str, Any]:
    """Add requests and abort nearly all of them at random points; drafts and cache are on.

    Raises:
        EngineError: a leak, or an answer that differs from a plain engine's.
    """
    plain = LLM(model, dtype="float32", enable_prefix_caching=False, max_num_seqs=1, **options)
    rng = random.Random(seed)
    prompts = [p[: rng.randrange(1, 60)] for p in prompts_of(plain, 40, 60)]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    expected = [plain.generate(p, params)[0].token_ids for p in prompts]
    llm = LLM(
        model, dtype="float32", num_speculative_tokens=2 if plain.model.mtp is not None else 0,
        max_num_seqs=16, num_gpu_blocks_override=_tight(plain), max_model_len=128, **options,
    )  # fmt: skip
    engine, memory = llm.engine, Memory()
    live: list[tuple[Request, int]] = []
    added = aborted = whole = 0
    began = time.perf_counter()
    while added < requests or live:
        while added < requests and rng.random() < 0.8 and len(live) < 64:
            place = rng.randrange(len(prompts))
            live.append((engine.add_request(prompts[place], params), place))
            added += 1
            if added % max(1, requests // 50) == 0:
                memory.sample()
                say(f"{added} added, {aborted} aborted, {whole} whole answers")
        engine.step()
        for entry in list(live):
            request, place = entry
            if request.finished:
                live.remove(entry)
                whole += 1
                _same(request, expected[place])
            elif rng.random() < 0.25:
                engine.abort(request)
                live.remove(entry)
                aborted += 1
        if engine.stats.num_steps % 50 == 0:
            engine.cache.check()
    _clean(llm)
    return {
        "what": f"abort storm, {requests} requests",
        "machine": machine(llm.model.device)["summary"],
        "aborted": aborted, "whole answers, all right": whole,
        "preempted": engine.stats.num_preempted, "leaks": 0,
        "resident memory, last quarter over second": memory.growth,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def soak(
    model: str | None = None,
    *,
    minutes: float = 15.0,
    chats: int = 6,
    turns: int = 8,
    seed: int = 0,
    say: Progress = lambda line: None,
    **options: Any,
) -> dict[str, Any]:
    """Conversations that share a long beginning and grow turn by turn, over and over.

    Raises:
        EngineError: a leak, or an answer that differs from a plain engine's.
    """
    plain = LLM(model, dtype="float32", enable_prefix_caching=False, max_num_seqs=1, **options)
    scripts = _scripts(plain, chats, turns)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    answers: list[list[list[int]]] = []
    for script in scripts:
        history, given = list(script[0]), []
        for said in script[1:]:
            history += said
            given.append(plain.generate(history, params)[0].token_ids)
            history += given[-1]
        answers.append(given)
    say("answers of the plain engine are there")
    drafts = 2 if plain.model.mtp is not None else 0
    llm = LLM(model, dtype="float32", num_speculative_tokens=drafts, **options)
    engine, memory, rng = llm.engine, Memory(), random.Random(seed)
    began, right, aborted, last = time.perf_counter(), 0, 0, 0.0
    state = [(list(script[0]), 0) for script in scripts]
    live: dict[int, Request] = {}
    while (now := time.perf_counter() - began) < 60 * minutes or live:
        for chat, script in enumerate(scripts):
            if chat not in live and now < 60 * minutes and rng.random() < 0.2:
                history, turn = state[chat]
                if turn == turns:
                    history, turn = list(script[0]), 0
                state[chat] = (history + script[1 + turn], turn)
                live[chat] = engine.add_request(state[chat][0], params)
        engine.step()
        for chat, request in list(live.items()):
            history, turn = state[chat]
            if request.finished:
                _same(request, answers[chat][turn])
                right += 1
                state[chat] = (history + answers[chat][turn], turn + 1)
                del live[chat]
            elif rng.random() < 0.002:  # the user stops and asks again
                engine.abort(request)
                aborted += 1
                live[chat] = engine.add_request(history, params)
        if now - last > max(1.0, minutes / 2):
            last = now
            memory.sample()
            engine.cache.check()
            say(f"{now:.0f} s, {right} answers right, {aborted} aborted")
    _clean(llm)
    stats = engine.stats
    return {
        "what": f"soak, {minutes:g} minutes, {chats} chats of {turns} turns",
        "machine": machine(llm.model.device)["summary"],
        "answers, all right": right, "aborted": aborted, "leaks": 0,
        "prompt tokens from the cache": stats.hit_rate,
        "drafts accepted": stats.acceptance_per_position,
        "resident memory, last quarter over second": memory.growth,
    }  # fmt: skip


def _scripts(llm: LLM, chats: int, turns: int) -> list[list[list[int]]]:
    """Per chat: the beginning (mostly shared), then what the user says in each turn."""
    if llm.tokenizer is None:
        raise EngineError("a soak needs a tokenizer")
    encode = llm.tokenizer.encode
    shared: list[int] = []
    while len(shared) < 480:
        for text in PROMPTS:
            shared += encode(f"{text} ({len(shared)}).\n")
    return [
        [
            [*shared, *encode(f"\nThis is conversation {chat}. ")],
            *([*encode(f"\nStep {turn} of {chat}: {PROMPTS[turn % len(PROMPTS)]}")]
              for turn in range(turns)),
        ]
        for chat in range(chats)
    ]  # fmt: skip


def _tight(llm: LLM) -> int:
    """Few enough blocks that sequences give way now and then."""
    return 10 * (128 // llm.engine.options.block_size + 2)


def _same(request: Request, expected: list[int]) -> None:
    (sequence,) = request.sequences
    if sequence.finish_reason == "error" or sequence.output_ids != expected:
        raise EngineError(
            f"request {request.request_id} gave {sequence.output_ids}, a plain engine {expected}"
        )


def _clean(llm: LLM) -> None:
    """Every block and slot is free or cached."""
    llm.engine.cache.check()
    if llm.engine.cache.leases:
        raise EngineError(f"leaked: {sorted(llm.engine.cache.leases)}")
    if llm.model.device.type == "cuda":
        torch.cuda.synchronize()
