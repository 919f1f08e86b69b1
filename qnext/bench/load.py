"""The engine under load: throughput beside a peer, latencies, prefix hits, overhead."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from qnext.bench.peer import PROMPTS, machine
from qnext.engine.llm import LLM
from qnext.engine.outputs import RequestOutput
from qnext.engine.request import Request
from qnext.engine.sampling_params import SamplingParams
from qnext.errors import ConfigError


def throughput(
    model: str | None = None,
    *,
    against: str | None = None,
    batch: int = 16,
    prompt_tokens: int = 64,
    new_tokens: int = 128,
    repeats: int = 3,
    **options: Any,
) -> dict[str, Any]:
    """Tokens per second of ``batch`` equal-length requests, ours and the peer's in turn.

    Raises:
        ConfigError: an unknown peer, or one that is not installed.
    """
    llm = LLM(model, enable_prefix_caching=False, max_num_seqs=batch, **options)
    prompts = prompts_of(llm, batch, prompt_tokens)
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    ways: dict[str, Callable[[], float]] = {
        "qnext": lambda: _seconds(lambda: llm.generate(prompts, params)),
    }
    if against == "transformers":
        for dtype in ("float32", "bfloat16"):
            peer = _peer(llm, dtype)
            ways[f"transformers {dtype}"] = lambda peer=peer: _seconds(  # type: ignore[misc]
                lambda: peer(prompts, new_tokens)
            )
    elif against is not None:
        raise ConfigError(f"peer {against!r} is not known", hint="known: transformers")
    for way in ways.values():
        way()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            found[name].append(batch * new_tokens / way())
    rates = {name: median(values) for name, values in found.items()}
    result = {
        "what": f"throughput, batch {batch}, {prompt_tokens} + {new_tokens} tokens",
        "machine": machine(llm.model.device)["summary"],
        "tokens_per_second": rates,
        "spread": {name: (min(v), max(v)) for name, v in found.items()},
    }
    peers = [rate for name, rate in rates.items() if name != "qnext"]
    if peers:
        result["times_peer"] = rates["qnext"] / max(peers)
    return result


def prefix(
    model: str | None = None,
    *,
    shared_tokens: int = 2000,
    suffix_tokens: int = 20,
    repeats: int = 5,
    **options: Any,
) -> dict[str, Any]:
    """Time to the first token of requests that share a prefix: the first, the second, an equal one.

    The first two differ in their last ``suffix_tokens`` tokens; nothing tells the engine where
    the shared part ends.
    """
    llm = LLM(model, **options)
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    llm.generate(prompts_of(llm, 1, 256)[0][::-1], params)  # warm up, on another text
    rows: dict[str, list[float]] = {"first": [], "second": [], "the same again": []}
    cached: dict[str, int | None] = {}
    for n in range(repeats):
        text = prompts_of(llm, n + 1, shared_tokens + 2 * suffix_tokens)[n]
        shared, rest = text[:shared_tokens], text[shared_tokens:]
        first, second = shared + rest[:suffix_tokens], shared + rest[suffix_tokens:]
        for name, prompt in (("first", first), ("second", second), ("the same again", second)):
            (output,) = llm.generate(prompt, params)
            rows[name].append(1e3 * (output.metrics.time_to_first_token or 0.0))
            cached[name] = output.metrics.num_cached_tokens
    medians = {name: median(values) for name, values in rows.items()}
    return {
        "what": f"time to first token, {shared_tokens} shared + {suffix_tokens} tokens",
        "machine": machine(llm.model.device)["summary"],
        "ms": medians,
        "cached_tokens": cached,
        "second_over_first": medians["second"] / medians["first"],
    }


def latency(
    model: str | None = None,
    *,
    concurrency: int = 8,
    requests: int = 32,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    **options: Any,
) -> dict[str, Any]:
    """Queue time, TTFT, TPOT and inter-token latency with ``concurrency`` requests at any time."""
    llm = LLM(model, max_num_seqs=concurrency, enable_prefix_caching=False, **options)
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    prompts = prompts_of(llm, requests, prompt_tokens)
    llm.generate(prompts[:concurrency], params.replace(max_tokens=4))
    engine, done = llm.engine, 0
    engine.reset_stats()
    began = time.perf_counter()
    waiting = list(prompts)
    running: list[Request] = []
    while waiting or running:
        while waiting and len(running) < concurrency:
            running.append(engine.add_request(waiting.pop(), params))
        engine.step()
        done += sum(request.finished for request in running)
        running = [request for request in running if not request.finished]
    stats = engine.stats
    return {
        "what": f"latency, {concurrency} at a time, {prompt_tokens} + {new_tokens} tokens",
        "machine": machine(llm.model.device)["summary"],
        "tokens_per_second": done * new_tokens / (time.perf_counter() - began),
        "ms": {
            name: {k: v and 1e3 * v for k, v in series.summary().items() if k != "count"}
            for name, series in (
                ("queue", stats.queue_time),
                ("time to first token", stats.time_to_first_token),
                ("time per output token", stats.time_per_output_token),
                ("inter-token", stats.inter_token),
            )
        },
    }


def overhead(
    model: str | None = None, *, running: int = 256, steps: int = 400, **options: Any
) -> dict[str, Any]:
    """Milliseconds of a decoding step without the model, on one core.

    The model's forward is replaced by rows that are there already; scheduling, block tables, the
    packed batch, arg-max over a small vocabulary and the bookkeeping of every token remain.
    """
    llm = LLM(
        model, max_num_seqs=running, max_num_batched_tokens=4 * running, skip_tokenizer_init=True,
        max_model_len=1024, **options,
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = _bare_steps(llm, running, steps)
    finally:
        torch.set_num_threads(threads)
    return {
        "what": f"overhead of a decoding step, {running} running",
        "machine": machine(llm.model.device)["summary"],
        "ms": {"median": 1e3 * median(times), "min": 1e3 * min(times), "max": 1e3 * max(times)},
    }


def _bare_steps(llm: LLM, running: int, steps: int) -> list[float]:
    model, engine = llm.model, llm.engine
    width, vocab = llm.config.hidden_size, engine.options.vocab_size
    hidden = torch.zeros(16 * running, width, device=model.device)
    logits = torch.zeros(running, vocab, device=model.device)
    logits[:, 1] = 1.0
    real = model.hidden_states, model.logits
    bare: Any = model
    bare.hidden_states = lambda ids, *_, **__: hidden[: len(ids)]
    bare.logits = lambda rows: logits[: len(rows), :64]
    sampler_vocab, engine.runner.sampler.vocab_size = engine.runner.sampler.vocab_size, 64
    try:
        params = SamplingParams(temperature=0.0, max_tokens=steps + 200, ignore_eos=True)
        for n in range(running):
            engine.add_request([n % 50, 2, 3, 4], params)
        while engine.scheduler.num_waiting:
            engine.step()
        for _ in range(20):
            engine.step()
        return [_seconds(engine.step) for _ in range(steps)]
    finally:
        bare.hidden_states, bare.logits = real
        engine.runner.sampler.vocab_size = sampler_vocab


def prompts_of(llm: LLM, count: int, length: int) -> list[list[int]]:
    """Different prompts of equal length from the texts of the single-request benchmark."""
    if llm.tokenizer is None:
        raise ConfigError("this model has no tokenizer to measure with")
    ids: list[int] = []
    while len(ids) < length + 7 * count:
        for text in PROMPTS:
            ids += llm.tokenizer.encode(text + f" {len(ids)}\n")
    return [ids[7 * n : 7 * n + length] for n in range(count)]


def table(result: dict[str, Any]) -> str:
    """A result as text."""
    lines = [f"{result['what']}; {result['machine']}"]
    for name, value in result.items():
        if name in ("what", "machine"):
            continue
        if isinstance(value, dict):
            lines += [f"  {name:22} {key:24} {_shown(one)}" for key, one in value.items()]
        else:
            lines.append(f"  {name:22} {_shown(value)}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {_shown(one)}" for key, one in value.items())
    if isinstance(value, (tuple, list)):
        return " .. ".join(_shown(one) for one in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _peer(llm: LLM, dtype: str) -> Callable[[list[list[int]], int], list[RequestOutput]]:
    """Hugging Face ``generate`` on the same folder, all prompts as one batch."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "transformers is not installed", hint="pip install 'qnext[test]'"
        ) from error
    transformers.logging.set_verbosity_error()
    loader: Any = transformers.AutoModelForCausalLM
    model = loader.from_pretrained(llm.model_path, dtype=getattr(torch, dtype))
    model = model.to(llm.model.device).eval()

    def generate(prompts: list[list[int]], count: int) -> Any:
        rows = torch.tensor(prompts, device=model.device)
        with torch.inference_mode():
            return model.generate(
                rows, attention_mask=torch.ones_like(rows), max_new_tokens=count,
                min_new_tokens=count, do_sample=False, temperature=None, top_p=None, top_k=None,
                repetition_penalty=1.0,
            )  # fmt: skip

    return generate
