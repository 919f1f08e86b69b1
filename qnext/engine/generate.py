"""The step loop. Engine owns model state, cache books, scheduler and runner, and knows token ids.

A step is synchronous, and given seeds deterministic: scheduler.py chooses the rows, runner.py runs
them. ``LLM`` calls ``step`` until its requests are finished; ``AsyncLLM`` calls it from a thread
of its own.
"""

from __future__ import annotations

import random
import time
from hashlib import blake2b

import torch

from qnext.engine.cache import CacheManager, DiskTier, HostTier, Tier
from qnext.engine.options import EngineOptions
from qnext.engine.outputs import RequestMetrics
from qnext.engine.request import Request, RequestText, Sequence
from qnext.engine.runner import Runner
from qnext.engine.sampling_params import SamplingParams
from qnext.engine.scheduler import PRIORITY_STEPS, Scheduler, Work
from qnext.engine.speculative import DraftPolicy
from qnext.engine.stats import EngineStats
from qnext.engine.swap import SwapEstimate
from qnext.engine.tensors import StateTensors
from qnext.engine.validation import check_request
from qnext.errors import ConfigError, RequestError
from qnext.layers.model import CausalLM


class Engine:
    """Runs requests over one model.

    Args:
        model: in eval mode; its device is where everything runs.
        options: limits and vocabulary.

    Raises:
        ConfigError: the pools cannot hold one sequence of ``max_model_len``.
    """

    def __init__(self, model: CausalLM, options: EngineOptions) -> None:
        self.model, self.options = model, options
        self.stats = EngineStats()
        longest = options.max_model_len + options.num_speculative_tokens + 1
        per_sequence = -(-longest // options.block_size)
        num_blocks = options.num_blocks or per_sequence * options.max_num_seqs
        if num_blocks < per_sequence:
            most = num_blocks * options.block_size - longest + options.max_model_len
            raise ConfigError(
                f"num_blocks={num_blocks} of {options.block_size} tokens cannot hold one sequence"
                f" of max_model_len={options.max_model_len}",
                hint=f"max_model_len={most} or num_blocks={per_sequence} would do",
            )
        snapshots = options.num_snapshots if options.enable_prefix_caching else 0
        self.state = model.new_state(
            options.max_num_seqs + snapshots,
            block_size=options.block_size,
            num_blocks=num_blocks,
            kv_dtype=options.kv_dtype,
        )
        tensors = StateTensors(self.state)
        fingerprint = _fingerprint(model, options)
        self.cache = CacheManager(
            tensors,
            num_blocks=num_blocks,
            block_size=options.block_size,
            num_slots=self.state.num_slots,
            needs_state=bool(self.state.delta_states),
            enable_prefix_caching=options.enable_prefix_caching,
            fingerprint=fingerprint,
            snapshot_interval=options.snapshot_interval,
            turn_end_ids=frozenset(options.eos_token_ids),
            tiers=_tiers(options, fingerprint, self.state.hidden.is_cuda),
        )
        swap = SwapEstimate(model, tensors, self.cache, options.preemption)
        self.scheduler = Scheduler(options, self.cache, swap.pays)
        self.runner = Runner(model, options, self.state, self.cache, self.stats)
        self._drafts = DraftPolicy(options.num_speculative_tokens, options.adaptive_drafts)
        self._seeds = random.Random(options.seed)
        self._arrivals = 0
        self._next_seq = 0
        self._stepping = False

    def add_request(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        text: RequestText | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Request:
        """Queue a request; refused at once if it can never be served.

        Args:
            prompt_token_ids: the prompt.
            params: its parameters.
            prompt: its text, given back with the output.
            text: how tokens become text.
            priority: lower goes first; 0 is usual.
            cache_salt: only requests with the same salt share cached prefixes.

        Raises:
            RequestError: see validation.py, or it needs more blocks than there are.
        """
        options = self.options
        check_request(
            prompt_token_ids,
            params,
            options.vocab_size,
            options.max_model_len,
            can_think=text is not None and text.thinking is not None,
            has_grammar=text is not None and text.grammar is not None,
        )
        if type(priority) is not int:
            raise RequestError(f"priority={priority!r} must be an integer; lower goes first")
        request = Request(
            request_id=str(self._arrivals),
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            params=params,
            metrics=RequestMetrics(arrival_time=time.monotonic()),
            text=text or RequestText(),
            salt=(cache_salt or "").encode(),
            order=self._arrivals + priority * PRIORITY_STEPS,
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )
        request.start(
            vocab_size=options.vocab_size,
            eos_token_ids=options.eos_token_ids,
            max_model_len=options.max_model_len,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            device=self.state.hidden.device,
            first_id=self._next_seq,
        )
        self._next_seq += len(request.sequences)
        self._arrivals += 1
        self.scheduler.add(request.sequences)
        self.stats.num_requests += 1
        self.stats.num_prompt_tokens += len(prompt_token_ids)
        return request

    def abort(self, request: Request) -> None:
        """End a request and free what it holds; finished sequences keep their reason.

        Within a step (a collected iterator may call this) the slots are freed at the step's end.
        """
        for sequence in request.sequences:
            sequence.finish("abort")
        self.scheduler.drop_waiting(request)
        if request.metrics.finished_time is None:
            self._ended(request)
        if not self._stepping:
            self._leave()

    def reset_stats(self) -> None:
        """Begin counting anew, for a measurement."""
        self.stats = self.runner.stats = EngineStats()

    def close(self) -> None:
        """End everything; what is cached goes to the disk tier, if there is one."""
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            self.abort(sequence.request)
        self.cache.close()

    @property
    def has_work(self) -> bool:
        """Whether anything is waiting or running."""
        return self.scheduler.has_work

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Run one batch.

        After an exception (an interrupt too) every running sequence is back in the queue with its
        tokens and will be run again, since states may be half written.

        Returns:
            the sequences that ran.
        """
        self._stepping = True
        began = time.perf_counter()
        try:
            num_drafts = self._drafts.choose(len(self.scheduler.running))
            work = self.scheduler.schedule(num_drafts)
            planned = time.perf_counter()
            self.stats.schedule_seconds += planned - began
            reading = False
            for w in work:
                reading = reading or (w.count > 0 and w.start < w.sequence.num_prompt)
                metrics = w.sequence.request.metrics
                if metrics.first_scheduled_time is None:
                    metrics.first_scheduled_time = time.monotonic()
                    self.stats.num_cached_tokens += metrics.num_cached_tokens or 0
            if work:
                self.runner.run(work, num_drafts)
            self._leave()
        except BaseException:
            self.stats.num_recomputed += len(self.scheduler.running)
            self.scheduler.requeue()
            raise
        finally:
            self._stepping = False
        self._count(work, reading, time.perf_counter() - began)
        return [w.sequence for w in work]

    def _count(self, work: list[Work], reading: bool, seconds: float) -> None:
        """Keep the step's statistics."""
        stats = self.stats
        if not work:
            return
        if reading:
            stats.num_prefill_steps += 1
            stats.prefill_seconds += seconds
        else:
            stats.num_decode_steps += 1
            stats.decode_seconds += seconds
            self._drafts.measured(work, seconds)
        stats.num_running = len(self.scheduler.running)
        stats.num_waiting = self.scheduler.num_waiting
        stats.num_preempted = self.scheduler.num_preempted
        stats.num_swapped = self.scheduler.num_swapped
        interval = self.options.check_interval
        if interval and stats.num_steps % interval == 0:
            self.cache.check(full=self.options.full_checks)

    def _leave(self) -> None:
        """Take finished sequences out; what they computed stays in the cache."""
        for sequence in self.scheduler.drop_finished():
            if sequence.poisoned:
                self.cache.discard(sequence.seq_id, poisoned=True)
            else:
                self.cache.finish(sequence.seq_id, sequence.num_computed)
            sequence.is_running = False
            if sequence.request.finished and sequence.request.metrics.finished_time is None:
                self._ended(sequence.request)

    def _ended(self, request: Request) -> None:
        request.metrics.finished_time = time.monotonic()
        self.stats.finished(request.metrics, request.sequences[0].finish_reason)


def _tiers(options: EngineOptions, fingerprint: bytes, cuda: bool) -> list[Tier]:
    """Where evicted blocks and states go."""
    found: list[Tier] = []
    if options.host_cache_bytes:
        found.append(HostTier(options.host_cache_bytes, pin_memory=cuda))
    if options.disk_cache is not None:
        found.append(
            DiskTier(options.disk_cache, options.disk_cache_bytes, fingerprint=fingerprint)
        )
    return found


def _fingerprint(model: CausalLM, options: EngineOptions) -> bytes:
    """Everything beside tokens that a cached state depends on."""
    parts = (
        options.weights_id,
        repr(model.config),
        str(model.dtype),
        str(options.kv_dtype),
        bool(options.num_speculative_tokens),
    )
    return blake2b(repr(parts).encode(), digest_size=16).digest()
