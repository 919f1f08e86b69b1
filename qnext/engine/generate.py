"""The step loop: prompts are read in pieces, all running sequences decode together.

Engine decides who runs; it knows token ids, not texts. A step is synchronous; llm.py calls it
until its requests are finished. runner.py does the work of a step.
"""

from __future__ import annotations

import random
import time
from collections import deque

import torch

from qnext.engine.options import EngineOptions
from qnext.engine.outputs import RequestMetrics
from qnext.engine.request import Request, RequestText, Sequence
from qnext.engine.runner import Runner
from qnext.engine.sampling_params import SamplingParams
from qnext.engine.slots import CacheSlots
from qnext.engine.stats import EngineStats
from qnext.engine.validation import check_request
from qnext.layers.model import CausalLM


class Engine:
    """Runs requests over one model.

    Args:
        model: in eval mode; its device is where everything runs.
        options: limits and vocabulary.
    """

    def __init__(self, model: CausalLM, options: EngineOptions) -> None:
        self.model, self.options = model, options
        self.stats = EngineStats()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.slots = CacheSlots(
            model,
            max_slots=options.max_num_seqs,
            max_tokens=options.max_model_len + options.num_speculative_tokens,
        )
        self._runner = Runner(model, options, self.slots, self.stats)
        self._seeds = random.Random(options.seed)
        self._next_id = 0
        self._stepping = False

    def add_request(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        text: RequestText | None = None,
    ) -> Request:
        """Queue a request; refused at once if it can never be served.

        Raises:
            RequestError: see validation.py.
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
        request = Request(
            request_id=str(self._next_id),
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            params=params,
            metrics=RequestMetrics(arrival_time=time.monotonic()),
            text=text or RequestText(),
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )
        request.start(
            vocab_size=options.vocab_size,
            eos_token_ids=options.eos_token_ids,
            max_model_len=options.max_model_len,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            device=self._runner.device,
        )
        self._next_id += 1
        self.waiting.extend(request.sequences)
        self.stats.num_requests += 1
        self.stats.num_prompt_tokens += len(prompt_token_ids)
        return request

    def abort(self, request: Request) -> None:
        """End a request and free what it holds; finished sequences keep their reason.

        Within a step (a collected iterator may call this) the slots are freed at the step's end.
        """
        for sequence in request.sequences:
            sequence.finish("abort")
        self.waiting = deque(s for s in self.waiting if s.request is not request)
        if not self._stepping:
            self._leave()

    @property
    def has_work(self) -> bool:
        """Whether anything is waiting or running."""
        return bool(self.waiting or self.running)

    @torch.inference_mode()
    def step(self) -> None:
        """One prefill piece and one decode step.

        After an exception (an interrupt too) every running sequence is back in the queue with its
        tokens and will be recomputed, since its cache may be half written.
        """
        self._stepping = True
        try:
            if self.waiting:
                self._admit()
            began = time.perf_counter()
            prefilling = [s for s in self.running if s.in_prefill]
            decoding = self.running
            if prefilling:
                decoding = [s for s in self.running if not s.in_prefill]
                self._runner.prefill(prefilling, self._fork)
                began, start = time.perf_counter(), began
                self.stats.num_prefill_steps += 1
                self.stats.prefill_seconds += began - start
            if decoding:
                self._runner.decode(decoding)
                self.stats.num_decode_steps += 1
                self.stats.decode_seconds += time.perf_counter() - began
            self._leave()
        except BaseException:
            self._requeue()
            raise
        finally:
            self._stepping = False

    def _admit(self) -> None:
        """Give free slots to waiting sequences, oldest first."""
        self.slots.ensure(len(self.waiting), len(self.waiting[0].tokens) + 1)
        # Siblings of a prompt that is still being read wait for it and copy its cache.
        reading = {id(s.request) for s in self.running if s.num_computed < s.num_prompt}
        waiting = list(self.waiting)
        kept: list[Sequence] = []
        for place, sequence in enumerate(waiting):
            if sequence.finish_reason is not None:
                continue
            if not self.slots.num_free:
                kept += waiting[place:]
                break
            if id(sequence.request) in reading and not sequence.output_ids:
                kept.append(sequence)
                continue
            reading.add(id(sequence.request))
            self.slots.take(sequence)
            self.running.append(sequence)
            if sequence.request.metrics.first_scheduled_time is None:
                sequence.request.metrics.first_scheduled_time = time.monotonic()
        self.waiting = deque(kept)

    def _fork(self, parent: Sequence) -> list[Sequence]:
        """Seat the waiting completions of the same prompt, as far as slots go."""
        if parent.output_ids or len(parent.request.sequences) == 1:
            return []
        found = [s for s in self.waiting if s.request is parent.request and not s.output_ids]
        found = found[: self.slots.num_free]
        for sequence in found:
            self.slots.fork(parent, sequence)
        self.running += found
        seated = set(found)
        self.waiting = deque(s for s in self.waiting if s not in seated)
        return found

    def _leave(self) -> None:
        """Take finished sequences out and free their slots."""
        if all(s.finish_reason is None for s in self.running):
            return
        for sequence in self.running:
            if sequence.finish_reason is not None:
                self.slots.leave(sequence)
                metrics = sequence.request.metrics
                if metrics.finished_time is None and sequence.request.finished:
                    metrics.finished_time = time.monotonic()
        self.running = [s for s in self.running if s.finish_reason is None]

    def _requeue(self) -> None:
        """Everyone back to the queue after a failed step: caches are not to be trusted."""
        for sequence in self.running:
            sequence.slot, sequence.num_computed, sequence.drafts = None, 0, []
            if sequence.request.prompt_logprobs is not None and not sequence.output_ids:
                sequence.request.prompt_logprobs = [None]
        again = [s for s in self.running if s.finish_reason is None]
        self.stats.num_recomputed += len(again)
        self.waiting = deque(dict.fromkeys([*again, *self.waiting]))
        self.running = []
        self.slots.clear()
