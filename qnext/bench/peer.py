"""Decode, prefill and MTP on this machine, side by side with a peer on the same weights.

Every figure is the median of several runs; ours and the peer's alternate, so that a machine that
slows down slows both.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from statistics import median
from typing import Any

import torch

from qnext.engine.llm import LLM
from qnext.engine.sampling_params import SamplingParams
from qnext.errors import ConfigError

PROMPTS = (
    "The State of the Union is a speech that the President of the United States gives to",
    "The database server keeps its data in a directory that",
    "To install the package on a new machine, first",
    "The file system is mounted read-only when",
)


@dataclass(frozen=True)
class BenchOptions:
    """What to measure; see ``qnext bench --help``."""

    model: str | None = None
    against: str | None = None
    dtype: str = "auto"
    peer_dtype: str = "auto"
    device: str = "auto"
    prompt_tokens: int = 2048
    new_tokens: int = 128
    repeats: int = 5


def run(options: BenchOptions) -> dict[str, Any]:
    """Measure and return everything as plain values.

    Raises:
        ConfigError: an unknown peer, or one that is not installed.
    """
    if options.against not in (None, "transformers"):
        raise ConfigError(f"peer {options.against!r} is not known", hint="known: transformers")
    # Without the prefix cache: the peer reads every prompt again too.
    load = partial(LLM, options.model, dtype=options.dtype, device=options.device,
                   enable_prefix_caching=False)  # fmt: skip
    plain = load()
    result: dict[str, Any] = {
        "options": asdict(options),
        "machine": machine(plain.model.device),
        "model": plain.model_path.name,
        "dtype": str(plain.model.dtype).removeprefix("torch."),
    }
    count = options.new_tokens
    prompt = _prompt(plain, options.prompt_tokens)
    ours: dict[str, Callable[[], float]] = {
        "decode_ms": partial(_decode_ms, plain, count),
        "prefill_ms": partial(_prefill_ms, plain, prompt),
    }
    drafting = {}
    if plain.model.mtp is not None:
        for k in (1, 2, 3):
            llm = load(num_speculative_tokens=k)
            drafting[k] = llm
            ours[f"mtp{k}_ms"] = partial(_decode_ms, llm, count)
    peers: dict[str, Callable[[], float]] = {}
    if options.against:
        names = ("float32", "bfloat16") if options.peer_dtype == "auto" else (options.peer_dtype,)
        for name in names:
            peer = _Transformers(plain, name)
            peers[f"decode_ms {name}"] = partial(peer.decode_ms, count)
            peers[f"prefill_ms {name}"] = partial(peer.prefill_ms, prompt)
            if name == "float32" and plain.model.dtype == torch.float32:
                result.update(peer.difference(plain, prompt[:512]))
    found: dict[str, list[float]] = {}
    for measure in (ours, peers):
        for once in measure.values():
            once()  # warm up: compilation, caches
    for _ in range(options.repeats):
        for measure in (ours, peers):
            for name, once in measure.items():
                found.setdefault(name, []).append(once())
    result["ours"] = {name: median(found[name]) for name in ours}
    result["spread"] = {name: (min(v), max(v)) for name, v in found.items()}
    result["acceptance"] = {k: llm.stats.acceptance_per_position for k, llm in drafting.items()}
    result.update(_bandwidth(plain, result["ours"]["decode_ms"]))
    if peers:
        result["peer"] = {name: median(found[name]) for name in peers}
        for what in ("decode_ms", "prefill_ms"):
            best = min(v for name, v in result["peer"].items() if name.startswith(what))
            result[f"{what.removesuffix('_ms')}_times_peer"] = best / result["ours"][what]
    if drafting:
        base = result["ours"]["decode_ms"]
        result["mtp_times_plain"] = {k: base / result["ours"][f"mtp{k}_ms"] for k in drafting}
    return result


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{result['model']}, {result['dtype']}, {result['machine']['summary']}",
        f"{'':26}{'median':>10}{'range':>22}",
    ]
    rows = [*result["ours"].items(), *result.get("peer", {}).items()]
    for name, value in rows:
        low, high = result["spread"][name]
        who = "transformers " if name in result.get("peer", {}) else "qnext "
        lines.append(f"{who + name:26}{value:10.2f}{f'{low:.2f} .. {high:.2f}':>22}")
    for key in ("decode_times_peer", "prefill_times_peer"):
        if key in result:
            lines.append(
                f"{key.replace('_', ' '):26}{result[key]:10.2f} (against its faster dtype)"
            )
    for k, times in result.get("mtp_times_plain", {}).items():
        shares = " ".join(f"{x:.0%}" for x in result["acceptance"][k])
        lines.append(f"MTP k={k} times plain        {times:10.2f} (drafts accepted {shares})")
    if "largest_logit_difference" in result:
        lines.append(
            f"against transformers fp32 {result['largest_logit_difference']:10.1e} largest logit "
            f"difference, KL {result['mean_kl']:.1e}, greedy the same {result['same_greedy']:.1%}"
        )
    lines.append(
        f"weights read per token    {result['bytes_per_token'] / 1e6:10.1f} MB, "
        f"{result['achieved_gb_s']:.1f} GB/s of {result['read_gb_s']:.1f} measured "
        f"({result['bandwidth_share']:.0%})"
    )
    return "\n".join(lines)


def _prompt(llm: LLM, count: int) -> list[int]:
    if llm.tokenizer is None:
        raise ConfigError("this model has no tokenizer to measure with")
    ids: list[int] = []
    while len(ids) < count:
        for text in PROMPTS:
            ids += llm.tokenizer.encode(text + "\n")
    return ids[:count]


def _decode_ms(llm: LLM, count: int) -> float:
    """Milliseconds per token, greedy, one request at a time, over several prompts."""
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    seconds = []
    for text in PROMPTS:
        started = time.perf_counter()
        llm.generate(text, params)
        seconds.append(time.perf_counter() - started)
    return 1e3 * sum(seconds) / len(seconds) / count


def _prefill_ms(llm: LLM, prompt: list[int]) -> float:
    """Milliseconds from a prompt to its first token."""
    started = time.perf_counter()
    llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
    return 1e3 * (time.perf_counter() - started)


class _Transformers:
    """The peer: Hugging Face ``generate`` on the same folder."""

    def __init__(self, llm: LLM, dtype: str) -> None:
        try:
            import transformers
        except ImportError as error:
            raise ConfigError(
                "transformers is not installed", hint="pip install 'qnext[test]'"
            ) from error
        transformers.logging.set_verbosity_error()
        self.llm = llm
        loader: Any = transformers.AutoModelForCausalLM
        model = loader.from_pretrained(llm.model_path, dtype=getattr(torch, dtype))
        self.model = model.to(llm.model.device).eval()

    def _generate(self, ids: list[int], count: int) -> float:
        rows = torch.tensor([ids], device=self.model.device)
        started = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                rows, attention_mask=torch.ones_like(rows), max_new_tokens=count,
                min_new_tokens=count, do_sample=False, temperature=None, top_p=None, top_k=None,
                repetition_penalty=1.0,
            )  # fmt: skip
        return time.perf_counter() - started

    def decode_ms(self, count: int) -> float:
        """Milliseconds per token: the prompt's own time is taken out."""
        assert self.llm.tokenizer is not None
        ids = self.llm.tokenizer.encode(PROMPTS[0])
        return 1e3 * (self._generate(ids, count + 1) - self._generate(ids, 1)) / count

    def prefill_ms(self, prompt: list[int]) -> float:
        """Milliseconds from a prompt to its first token."""
        return 1e3 * self._generate(prompt, 1)

    def difference(self, llm: LLM, prompt: list[int]) -> dict[str, float]:
        """How far our logits are from the peer's on a text: largest difference, KL, arg-max.

        Half of it is read as a prompt and half token by token, as the engine does.
        """
        ids = torch.tensor(prompt, device=self.model.device)
        with torch.inference_mode():
            state = llm.model.new_state(1, len(prompt))
            half = len(prompt) // 2
            rows, start = [], 0
            for stop in (half, *range(half + 1, len(prompt) + 1)):
                batch = state.batch([stop - start], slots=[0], context_lens=[start])
                rows.append(llm.model.hidden_states(ids[start:stop], batch, state))
                start = stop
            ours = llm.model.logits(torch.cat(rows))
            theirs = self.model(ids[None]).logits[0].float()
            kl = torch.nn.functional.kl_div(
                ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean"
            )
            same = ours.argmax(-1) == theirs.argmax(-1)
            return {
                "largest_logit_difference": float((theirs - ours).abs().max()),
                "mean_kl": float(kl),
                "same_greedy": float(same.float().mean()),
            }


def _bandwidth(llm: LLM, decode_ms: float) -> dict[str, float]:
    """Bytes of weights that one token reads, and the share of memory bandwidth that makes."""
    from qnext.checkpoint.census import active_parameter_count

    model, config = llm.model, llm.config
    width = model.dtype.itemsize if model.fused is None else 2
    active = active_parameter_count(config)
    if not config.tie_word_embeddings:
        active -= config.vocab_size * config.hidden_size  # one row of the embedding only
    rate = active * width / (decode_ms / 1e3) / 1e9
    peak = _read_rate(model.device)
    return {
        "bytes_per_token": active * width,
        "achieved_gb_s": rate,
        "read_gb_s": peak,
        "bandwidth_share": rate / peak,
    }


def _read_rate(device: torch.device) -> float:
    """GB/s of summing an array far larger than the caches."""
    data = torch.ones(64_000_000, device=device)
    best = 0.0
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        data.sum().item()
        best = max(best, data.nbytes / (time.perf_counter() - started) / 1e9)
    return best


def machine(device: torch.device) -> dict[str, Any]:
    """What ran this, in one line and in parts."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    versions = {p: _version(p) for p in ("torch", "transformers", "numba", "numpy")}
    shown = ", ".join(f"{p} {v}" for p, v in versions.items() if v)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": versions,
        "summary": f"{name}, {torch.get_num_threads()} threads, {shown}",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except Exception:
        return None
