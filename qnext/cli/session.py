"""What ``generate`` and ``chat`` share: their options, a loaded model, and how fast it was."""

from __future__ import annotations

import ast
import inspect
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qnext.engine.llm import LLM
    from qnext.engine.sampling_params import SamplingParams

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder or hub id; default: the model in the box."),
]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; default: the model's own.")]
TopP = Annotated[float | None, typer.Option(help="Nucleus; default: the model's own.")]
TopK = Annotated[int | None, typer.Option(help="Best k only; default: the model's own.")]
Penalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty", help="Above 1: less repetition; default: the model's own."
    ),
]
MaxThinking = Annotated[
    int | None, typer.Option(help="Most tokens within <think>; then the block is closed.")
]

Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float32, float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Offline = Annotated[bool, typer.Option(help="Use only what is downloaded.")]

_ENGINE: dict[str, tuple[Any, Any]] = {
    "seed": (int, "Of the sampling: the same seed, the same text."),
    "num_speculative_tokens": (str, "MTP drafts per step: 0..8 or auto."),
    "dtype": (str, "auto, bfloat16, float32, float16."),
    "device": (str, "auto, cpu, cuda."),
    "max_model_len": (int | None, "Most tokens of prompt and output; default: what fits."),
    "max_num_seqs": (int | None, "Sequences at the same time; default: by memory."),
    "max_num_batched_tokens": (int | None, "Rows of a step; default: by device."),
    "block_size": (int, "Tokens of a KV block."),
    "enable_prefix_caching": (bool, "Go on from what earlier prompts computed."),
    "kv_cache_dtype": (str, "auto, bfloat16, float16, float32, fp8."),
    "disk_cache": (Path | None, "Folder for cached prefixes, used again by later runs."),
    "enforce_eager": (bool, "No CUDA graphs."),
    "deterministic": (bool, "The same bits in any company; CPU, slower."),
    "revision": (str | None, "Branch, tag or commit of a hub id."),
    "offline": (bool, "Use only what is downloaded."),
}
"""Options of ``LLM`` that every verb takes; the defaults are those of ``LLM`` itself."""

_SHORT = {"num_speculative_tokens": ("--num-speculative-tokens", "-k")}
_DEFAULTS = {"num_speculative_tokens": "auto"}


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the engine's options; it receives a ``Loader`` as ``load``."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for name, p in signature.parameters.items() if name != "load"]
    defaults = _llm_defaults()
    shared = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS.get(name, defaults[name]),
            annotation=Annotated[kind, typer.Option(*_SHORT.get(name, ()), help=text)],
        )
        for name, (kind, text) in _ENGINE.items()
    ]  # fmt: skip

    @wraps(command)
    def run(*args: Any, **given: Any) -> None:
        with closing(Loader({name: given.pop(name) for name in _ENGINE})) as load:
            command(*args, **given, load=load)

    every = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *shared]
    run.__signature__ = signature.replace(parameters=every)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in every}
    return run


def _llm_defaults() -> dict[str, Any]:
    """Defaults of ``LLM.__init__`` read from its source: ``--help`` must not import torch."""
    path = Path(__file__).parents[1] / "engine/llm.py"
    functions = (
        node.args
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    arguments = next(functions)
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return {arg.arg: ast.literal_eval(value) for arg, value in pairs if value is not None}


class Loader:
    """Loads a verb's model with the options given, and closes it when the verb ends."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options, self._stack = options, ExitStack()

    def __call__(self, model: str | None) -> LLM:
        """The model, announced on stderr with its size and the time it took."""
        started = time.perf_counter()
        from qnext.engine.llm import LLM

        drafts = self._options["num_speculative_tokens"]
        if drafts.isascii() and drafts.isdigit():
            drafts = int(drafts)
        llm = LLM(model, **{**self._options, "num_speculative_tokens": drafts})
        self._stack.callback(llm.close)
        seconds = time.perf_counter() - started
        typer.echo(f"[{describe(llm)}; ready in {seconds:.1f} s]", err=True)
        return llm

    def close(self) -> None:
        """Close what was loaded."""
        self._stack.close()


def describe(llm: LLM) -> str:
    """One line: name, kind, size, active size, precision and device."""
    from qnext.checkpoint.census import active_parameter_count, parameter_count

    total, mtp = parameter_count(llm.config)
    name = llm.model_path.name
    if llm.model_path.parent.name == "snapshots":  # a hub cache: .../models--org--name/snapshots/x
        name = llm.model_path.parents[1].name.removeprefix("models--").replace("--", "/")
    kind: str = llm.config.model_type
    if name == "qnext-small":
        kind += " trained by this project on technical prose, a base model"
    sizes = f"{short(total)} parameters, {short(active_parameter_count(llm.config))} active"
    if mtp:
        sizes += f", MTP {short(mtp)}"
    dtype = str(llm.model.dtype).removeprefix("torch.")
    return f"{name}: {kind}; {sizes}; {dtype} on {llm.model.device}"


def short(count: int) -> str:
    """``79,674,391,296`` as ``80B``, as model names round it."""
    if count >= 1e9:
        return f"{count / 1e9:.0f}B"
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.1f}K"


def sampling(
    llm: LLM,
    max_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    **more: Any,
) -> SamplingParams:
    """The model's recommended values with those of the command line in their place."""
    given: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        **more,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    return llm.get_default_sampling_params().replace(max_tokens=max_tokens, **changes)


class Pace:
    """What the engine did since this was made."""

    def __init__(self, llm: LLM) -> None:
        self._stats, self._started = llm.stats, time.perf_counter()
        s = self._stats
        self._prompt, self._generated = s.num_prompt_tokens, s.num_generated_tokens
        self._cached = s.num_cached_tokens
        self._seconds, self._first = s.decode_seconds, s.prefill_seconds
        self._drafted, self._accepted = list(s.num_drafted), list(s.num_accepted)

    def facts(self) -> dict[str, Any]:
        """Counts, tokens per second of decoding, and the accepted share of drafts by position."""
        s = self._stats
        generated, seconds = s.num_generated_tokens - self._generated, s.decode_seconds
        seconds -= self._seconds
        drafted = _less(s.num_drafted, self._drafted)
        accepted = _less(s.num_accepted, self._accepted)
        return {
            "prompt_tokens": s.num_prompt_tokens - self._prompt,
            "cached_tokens": s.num_cached_tokens - self._cached,
            "generated_tokens": generated,
            "prefill_seconds": s.prefill_seconds - self._first,
            "decode_seconds": seconds,
            # The first token comes out of the prefill.
            "decode_tokens_per_s": (generated - 1) / seconds if generated > 1 and seconds else None,
            "acceptance_per_position": [a / d for a, d in zip(accepted, drafted, strict=True) if d],
        }

    def line(self) -> str:
        """The same for a reader."""
        facts = self.facts()
        text = f"{facts['generated_tokens']} tokens"
        if facts["decode_tokens_per_s"]:
            text += f", {facts['decode_tokens_per_s']:.0f} tokens/s"
        if facts["acceptance_per_position"]:
            shares = " ".join(f"{x:.0%}" for x in facts["acceptance_per_position"])
            text += f", MTP drafts accepted {shares}"
        return f"[{text}]"


def _less(now: list[int], before: list[int]) -> list[int]:
    return [n - b for n, b in zip(now, before + [0] * (len(now) - len(before)), strict=True)]


def write(text: str) -> None:
    """Show text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
