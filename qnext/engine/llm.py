"""LLM: prompts in, texts out, offline. The public face of the engine.

Resolves the model folder, loads model and tokenizer, turns prompts into requests and steps the
engine (generate.py) until they are finished. Not for several threads at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import torch

from qnext.checkpoint import load_model
from qnext.checkpoint.identity import weights_id
from qnext.checkpoint.load import parse_device
from qnext.config import ModelConfig
from qnext.engine.defaults import (
    GenerationDefaults,
    longest_context,
    resolve_dtype,
    resolve_kv_dtype,
)
from qnext.engine.generate import Engine
from qnext.engine.grammar import Grammar, GrammarCompiler
from qnext.engine.options import EngineOptions, Preemption
from qnext.engine.outputs import CompletionOutput, RequestOutput, StreamDelta
from qnext.engine.plan import (
    MemoryPlan,
    WeightFormat,
    compare,
    free_memory,
    measure,
    plan_memory,
)
from qnext.engine.progress import progress_bar
from qnext.engine.prompts import (
    ParsedPrompt,
    Prompt,
    parse_conversations,
    parse_prompt,
    parse_prompts,
)
from qnext.engine.request import Request, RequestText, news
from qnext.engine.sampling_params import SamplingParams, nearest_hint
from qnext.engine.speculative import resolve_num_drafts
from qnext.engine.stats import EngineStats
from qnext.engine.thinking import ThinkTokens, template_thinks
from qnext.engine.validation import check_request, truncated
from qnext.errors import ConfigError, RequestError
from qnext.hub import resolve_model
from qnext.layers.fused import fuse
from qnext.layers.invariant import make_invariant
from qnext.layers.model import CausalLM

if TYPE_CHECKING:
    from qnext.text import ChatTemplate, Tokenizer

Message = dict[str, Any]
Conversation = list[Message]

log = logging.getLogger(__name__)


class LLM:
    """A model ready to generate.

    Args:
        model: folder, hub id, or None for the model in the box.
        dtype: "auto" (see ``resolve_dtype``), "float32", "bfloat16", "float16" or a torch dtype.
        device: "auto" (CUDA if there is one), or a torch device.
        tokenizer: folder or hub id of another tokenizer.
        skip_tokenizer_init: work on token ids alone; no texts, stop strings or chat.
        max_model_len: most tokens of prompt and output; None means what the model was made for.
        max_num_seqs: sequences that run at the same time; None decides by memory.
        max_num_batched_tokens: rows of a step; None decides by device.
        num_speculative_tokens: MTP drafts per step, 0..8, or "auto": as many as pay, chosen for
            each step from measurements.
        block_size: tokens of a KV block.
        enable_prefix_caching: whether prompts may go on from what earlier requests computed.
        kv_cache_dtype: of keys and values: "auto" (the model's), "bfloat16", "float16",
            "float32" or "fp8" (e4m3).
        num_gpu_blocks_override: KV blocks, on whatever device; None decides by memory.
        num_snapshots: DeltaNet states that the prefix cache may keep; None decides by memory.
        snapshot_interval: tokens between states kept of a prompt, beside those that the policy
            chooses.
        host_cache_gib: host memory for cached prefixes that the device has no room for.
        disk_cache: folder for cached prefixes, used again by later processes.
        disk_cache_gib: most of it.
        preemption_mode: "auto", "recompute" or "swap": how a sequence gives way when blocks run
            out.
        enforce_eager: no CUDA graphs; there are none to switch off yet.
        deterministic: the same request gives bitwise the same tokens and logprobs in any company,
            cached or not, in any pieces, and (greedy) with drafts or without; on a CPU only, and
            slower (docs/numerics.md).
        seed: of requests that bring no seed.
        revision: branch, tag or commit of a hub id.
        offline: never ask the network.
        unknown: refused, with the nearest known name.

    Raises:
        ConfigError: an unknown option or a value outside its range.
        CheckpointError: the folder cannot be loaded.
        HubError: the model cannot be found or fetched.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        tokenizer: str | Path | None = None,
        skip_tokenizer_init: bool = False,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        num_speculative_tokens: int | str | None = 0,
        block_size: int = 16,
        enable_prefix_caching: bool = True,
        kv_cache_dtype: str = "auto",
        num_gpu_blocks_override: int | None = None,
        num_snapshots: int | None = None,
        snapshot_interval: int | None = None,
        host_cache_gib: float = 0.0,
        disk_cache: str | Path | None = None,
        disk_cache_gib: float = 16.0,
        preemption_mode: str = "auto",
        enforce_eager: bool = False,
        deterministic: bool = False,
        seed: int = 0,
        revision: str | None = None,
        offline: bool = False,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            known = [p for p in signature(LLM).parameters if p != "unknown"]
            raise ConfigError(f"LLM has no option {name!r}", hint=nearest_hint(name, known))
        target = parse_device(device)
        wanted = resolve_dtype(dtype, target)
        _check_count("block_size", block_size)
        for name, value in (
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("num_gpu_blocks_override", num_gpu_blocks_override),
        ):
            if value is not None:
                _check_count(name, value)
        resolve_kv_dtype(kv_cache_dtype)
        for name, size in (("host_cache_gib", host_cache_gib), ("disk_cache_gib", disk_cache_gib)):
            if not isinstance(size, (int, float)) or size < 0:
                raise ConfigError(f"{name}={size!r} must be a number, at least 0")
        if preemption_mode not in get_args(Preemption):
            raise ConfigError(
                f"preemption_mode={preemption_mode!r} must be one of {get_args(Preemption)}"
            )
        if type(seed) is not int:
            raise ConfigError(f"seed={seed!r} must be an integer")
        self.model_path: Path = resolve_model(model, revision=revision, offline=offline)
        self.config: ModelConfig = ModelConfig.from_pretrained(self.model_path)
        resolve_num_drafts(num_speculative_tokens, has_mtp=True)  # refuse a wrong value early
        longest = longest_context(self.config)
        if max_model_len is not None:
            _check_count("max_model_len", max_model_len, longest)
        self.tokenizer: Tokenizer | None = None
        self._closed = False
        self._chat_template: ChatTemplate | None = None
        self._compiler: GrammarCompiler | None = None
        self._think_tokens: ThinkTokens | None = None
        self._words_path = self.model_path
        vocab, unused = self.config.vocab_size, tuple[int, ...]()
        if not skip_tokenizer_init:
            from qnext.text import Tokenizer

            if tokenizer is not None:
                self._words_path = resolve_model(tokenizer, offline=offline)
            self.tokenizer = Tokenizer.from_pretrained(self._words_path)
            padding = self.tokenizer.padding_ids(vocab)
            vocab = self.tokenizer.vocab_size
            unused = tuple(token for token in padding if token < vocab)
        self.defaults = GenerationDefaults.from_folder(self.model_path, self.config)
        self.model: CausalLM = load_model(
            self.model_path, dtype=wanted, device=target, progress=True
        )
        if deterministic:
            make_invariant(self.model)
        else:
            fuse(self.model, half=dtype == "auto")
        self.config = self.model.config
        drafts = resolve_num_drafts(num_speculative_tokens, has_mtp=self.model.mtp is not None)
        self.plan: MemoryPlan = plan_memory(
            self.config,
            weights=WeightFormat(str(self.model.dtype).removeprefix("torch.")),
            memory_bytes=free_memory(target) if target.type == "cuda" else None,
            device="cuda" if target.type == "cuda" else "cpu",
            weights_loaded=True,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            kv_cache_dtype=kv_cache_dtype,
            num_speculative_tokens=drafts,
            enable_prefix_caching=enable_prefix_caching,
            snapshots=num_snapshots,
            enforce_eager=enforce_eager,
            compiled_copies=deterministic or self.model.fused is not None,
        ).require()
        self.engine = Engine(
            self.model,
            EngineOptions(
                vocab_size=vocab,
                unused_ids=unused,
                max_model_len=self.plan.max_model_len,
                eos_token_ids=self.defaults.eos_token_ids,
                max_num_seqs=self.plan.max_num_seqs,
                max_num_batched_tokens=self.plan.request.max_num_batched_tokens,
                num_speculative_tokens=drafts,
                adaptive_drafts=num_speculative_tokens == "auto",
                block_size=block_size,
                num_blocks=num_gpu_blocks_override or self.plan.num_blocks or None,
                num_snapshots=self.plan.num_snapshots,
                enable_prefix_caching=enable_prefix_caching,
                snapshot_interval=snapshot_interval,
                kv_dtype=resolve_kv_dtype(kv_cache_dtype),
                host_cache_bytes=int(host_cache_gib * 2**30),
                disk_cache=None if disk_cache is None else Path(disk_cache),
                disk_cache_bytes=int(disk_cache_gib * 2**30),
                weights_id=weights_id(self.model_path) if disk_cache is not None else b"",
                preemption=cast("Preemption", preemption_mode),
                seed=seed,
            ),
        )
        log.info("%s", compare(self.plan, measure(self.model, self.engine.state)))

    def close(self) -> None:
        """End all requests and write cached prefixes to ``disk_cache``, if there is one; once."""
        if not self._closed:
            self._closed = True
            self.engine.close()

    @property
    def stats(self) -> EngineStats:
        """Totals since the LLM was built."""
        return self.engine.stats

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output."""
        return self.engine.options.max_model_len

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json recommends."""
        return self.defaults.sampling_params()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        progress: bool = False,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Complete every prompt.

        Args:
            prompts: a text, a list of token ids, a dict with either, or a list of those.
            sampling_params: for all prompts, or one per prompt; None takes the model's defaults.
            priority: one integer per prompt, lower goes first.
            progress: show a bar on a terminal.
            use_tqdm: vLLM's name for ``progress``.

        Returns:
            one RequestOutput per prompt, in order.

        Raises:
            RequestError: a prompt or parameter that can never be served; nothing was run.
        """
        parsed = parse_prompts(prompts)
        every = self._params_of(sampling_params, len(parsed))
        ranks = [0] * len(parsed) if priority is None else list(priority)
        if len(ranks) != len(parsed):
            raise RequestError(f"priority has {len(ranks)} entries for {len(parsed)} prompts")
        made = [
            self.prepare(prompt, one, rank)
            for prompt, one, rank in zip(parsed, every, ranks, strict=True)
        ]
        requests: list[Request] = []
        try:
            requests.extend(make() for make in made)
            with progress_bar(len(requests), shown=progress or use_tqdm) as advance:
                done = 0
                while done < len(requests):
                    self.engine.step()
                    now = sum(request.finished for request in requests)
                    if now != done:
                        advance(now)
                        done = now
        finally:
            for request in requests:
                if not request.finished:
                    self.engine.abort(request)
        return [self.output(request) for request in requests]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        progress: bool = False,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation or several; each is a list of {"role", "content"} dicts.

        Raises:
            RequestError: as ``generate``.
            TextError: the chat template refuses the messages, or there is none.
        """
        render = partial(
            self.render_chat,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            chat_template_kwargs=chat_template_kwargs,
        )
        prompts = [render(conversation) for conversation in parse_conversations(messages)]
        return self.generate(prompts, sampling_params, progress=progress or use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[StreamDelta]:
        """Complete one prompt and yield what is new after each step.

        The request is checked now and starts with the first ``next``; closing the iterator ends it.

        Raises:
            RequestError: as ``generate``.
        """
        (params,) = self._params_of(sampling_params, 1)
        return self._deltas(self.prepare(parse_prompt(prompt), params))

    def chat_stream(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> Iterator[StreamDelta]:
        """``stream`` for a conversation."""
        prompt = self.render_chat(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.stream(prompt, sampling_params)

    def render_chat(
        self,
        messages: Conversation,
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation, through the checkpoint's own template.

        Raises:
            RequestError: no messages, or no tokenizer.
            TextError: the template refuses them, or there is none.
        """
        if not messages:
            raise RequestError("the conversation has no messages")
        if self.tokenizer is None:
            raise _no_tokenizer("chat")
        if self._chat_template is None:
            from qnext.text import ChatTemplate

            self._chat_template = ChatTemplate.from_pretrained(self._words_path)
        return self._chat_template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **(chat_template_kwargs or {}),
        )

    def _params_of(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if given is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        each: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
        wrong = [one for one in each if not isinstance(one, SamplingParams)]
        if wrong or len(each) != count:
            found = type(wrong[0]).__name__ if wrong else f"{len(each)} of them"
            raise RequestError(
                f"sampling_params must be one SamplingParams, or one for each of the {count}"
                f" prompts; found {found}"
            )
        return each

    def prepare(
        self, prompt: ParsedPrompt, params: SamplingParams, priority: int = 0
    ) -> Callable[[], Request]:
        """Check a request; calling the result adds it to the engine.

        Raises:
            RequestError: it can never be served.
        """
        tokenizer, text, ids = self.tokenizer, prompt.text, prompt.token_ids
        handling = RequestText()
        if tokenizer is None:
            if text is not None:
                raise _no_tokenizer("a text prompt")
            for name in ("stop", "bad_words", "structured_outputs"):
                if getattr(params, name):
                    raise _no_tokenizer(name)
        else:
            from qnext.engine.text_stream import TextStream

            if ids is None:
                ids = tokenizer.encode(text or "")
            handling = RequestText(
                partial(TextStream, tokenizer, params) if params.detokenize else None,
                lambda token: tokenizer.decode([token], skip_special_tokens=False),
                _bad_words(tokenizer, params.bad_words),
                *self._rules(tokenizer, params),
            )
        options = self.engine.options
        ids = truncated(ids or [], params, options.max_model_len)
        check_request(
            ids,
            params,
            options.vocab_size,
            options.max_model_len,
            can_think=handling.thinking is not None,
            has_grammar=handling.grammar is not None,
        )
        return partial(
            self.engine.add_request, ids, params, prompt=text, text=handling, priority=priority
        )

    def _rules(
        self, tokenizer: Tokenizer, params: SamplingParams
    ) -> tuple[Grammar | None, ThinkTokens | None]:
        """The grammar and the ids around think blocks, where the request needs them."""
        if params.structured_outputs is None and params.max_thinking_tokens is None:
            return None, None
        if self._compiler is None:
            options = self.engine.options
            self._compiler = GrammarCompiler(tokenizer, options.vocab_size, options.eos_token_ids)
            self._think_tokens = ThinkTokens.of(
                tokenizer, model_opens=template_thinks(self._words_path)
            )
        asked = params.structured_outputs
        return None if asked is None else self._compiler.compile(asked), self._think_tokens

    def _deltas(self, make: Callable[[], Request]) -> Iterator[StreamDelta]:
        request = make()
        sent = [(0, 0)] * len(request.sequences)
        unsent = list(request.sequences)
        try:
            while unsent:
                # Another caller's steps may have moved this request while it was suspended here.
                if not request.finished:
                    self.engine.step()
                for sequence in list(unsent):
                    delta, sent[sequence.index] = news(sequence, *sent[sequence.index])
                    if delta is not None:
                        if delta.finish_reason is not None:
                            unsent.remove(sequence)
                        yield delta
        finally:
            if not request.finished:
                self.engine.abort(request)

    def output(self, request: Request) -> RequestOutput:
        """What a request gives back, finished or not."""
        outputs = [
            CompletionOutput(
                index=sequence.index,
                text=sequence.text.text if sequence.text else "",
                token_ids=sequence.output_ids,
                logprobs=sequence.logprobs,
                cumulative_logprob=(
                    None if sequence.logprobs is None else sequence.cumulative_logprob
                ),
                finish_reason=sequence.finish_reason,
                stop_reason=sequence.stop_reason,
                error=sequence.error,
            )
            for sequence in request.sequences
        ]
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=outputs,
            prompt_logprobs=request.prompt_logprobs,
            metrics=request.metrics,
        )


def _bad_words(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token ids of each word, at the start of a text and after a space."""
    found = {tuple(tokenizer.encode(form)) for word in words for form in (word, f" {word.strip()}")}
    return tuple(sorted(ids for ids in found if ids))


def _check_count(name: str, value: Any, most: int | None = None) -> None:
    if type(value) is not int or value < 1 or (most is not None and value > most):
        limit = "at least 1" if most is None else f"1..{most}"
        raise ConfigError(f"{name}={value!r} must be an integer, {limit}")


def _no_tokenizer(what: str) -> RequestError:
    return RequestError(
        f"{what} needs a tokenizer, and skip_tokenizer_init=True left it out",
        hint="give token ids, or load with skip_tokenizer_init=False",
    )
