"""Who runs in the next step, and which rows: continuous batching under a token budget.

Every running sequence that is past its prompt runs in every step (its newest token and its
drafts); what is left of the budget goes to prompts in pieces, the ones already begun first, then
waiting ones. When blocks run out, the sequence that came last gives way.

Order is by ``Sequence.order``: arrival plus ``priority`` times ``PRIORITY_STEPS``. A request is
thus overtaken only by those that arrive within a fixed number of places after it: none starves.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

from qnext.engine.cache import CacheManager
from qnext.engine.options import EngineOptions
from qnext.engine.request import Request, Sequence

PRIORITY_STEPS = 1000
"""Places in the queue that one unit of priority is worth."""

_by_order = attrgetter("order")


@dataclass(slots=True)
class Work:
    """What one sequence does in a step.

    Attributes:
        sequence: who.
        start: tokens that its cache holds.
        count: known tokens to run, ``tokens[start : start + count]``; 0 for a prompt that the
            cache holds whole, which samples from its stored hidden state.
        drafts: after them, to be verified.
        saves: (position, slot) snapshots to take on the way.
        samples: the last known token is among them (or stored), so a token comes out.
        lead: the MTP row of the token before ``start`` is still to be made, from the slot's
            stored hidden state.
        num_rows: rows in the packed batch.
    """

    sequence: Sequence
    start: int
    count: int
    drafts: list[int]
    saves: list[tuple[int, int]]
    samples: bool
    lead: bool
    num_rows: int


class SwapCost(Protocol):
    """Whether copying a sequence out and in beats computing it again."""

    def __call__(self, sequence: Sequence) -> bool:
        """True for copying."""


class Scheduler:
    """Waiting and running sequences.

    Args:
        options: limits.
        cache: blocks and slots.
        swap_pays: decides how a sequence gives way.
    """

    def __init__(self, options: EngineOptions, cache: CacheManager, swap_pays: SwapCost) -> None:
        self.options, self.cache = options, cache
        self.running: list[Sequence] = []
        self.num_preempted = 0
        self.num_swapped = 0
        self._waiting: list[tuple[int, int, Sequence]] = []
        self._swap_pays = swap_pays
        self._ahead = 0

    @property
    def has_work(self) -> bool:
        """Whether anything is waiting or running."""
        return bool(self.running or self._waiting)

    @property
    def waiting(self) -> list[Sequence]:
        """Waiting sequences, next first."""
        return [sequence for *_, sequence in sorted(self._waiting, key=lambda entry: entry[:2])]

    @property
    def num_waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue new sequences."""
        for sequence in sequences:
            heapq.heappush(self._waiting, (sequence.order, sequence.seq_id, sequence))

    def drop_finished(self) -> list[Sequence]:
        """Take finished sequences out of both queues; the running ones among them are returned."""
        done = [s for s in self.running if s.finish_reason is not None]
        if done:
            self.running = [s for s in self.running if s.finish_reason is None]
        return done

    def drop_waiting(self, request: Request) -> None:
        """Take a request's sequences out of the queue."""
        kept = [entry for entry in self._waiting if entry[2].request is not request]
        if len(kept) < len(self._waiting):
            heapq.heapify(kept)
            self._waiting = kept

    def schedule(self, num_drafts: int) -> list[Work]:
        """Choose the rows of the next step and reserve what they need.

        Args:
            num_drafts: MTP drafts that this step will propose, so that their rows have room.
        """
        work: list[Work] = []
        prefilling: list[Sequence] = []
        self._ahead, preempted, place = num_drafts, self.num_preempted, 0
        while place < len(self.running):
            sequence = self.running[place]
            tokens, start = len(sequence.tokens), sequence.num_computed
            if start < tokens - 1:
                prefilling.append(sequence)
            elif tokens + len(sequence.drafts) + num_drafts <= sequence.reserved or self._reserve(
                sequence, tokens + len(sequence.drafts) + num_drafts
            ):
                drafts = sequence.drafts
                work.append(Work(sequence, start, 1, drafts, [], True, False, 1 + len(drafts)))
            else:
                continue  # somebody gave way, perhaps this one
            place += 1
        rows = sum(one.num_rows for one in work)
        budget = max(1, self.options.max_num_batched_tokens - rows)
        for sequence in prefilling:
            if sequence.is_running and budget > 0:
                piece = self._piece(sequence, budget)
                budget -= piece.count
                work.append(piece)
        # After somebody gave way nobody is seated: it would give way again.
        if budget > 0 and self._waiting and preempted == self.num_preempted:
            self._admit(work, budget)
        return work

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue with its tokens."""
        self.running.remove(sequence)
        self.num_preempted += 1
        self.cache.commit(sequence.seq_id, sequence.num_computed)
        if sequence.num_computed and self._swap_pays(sequence):
            self.num_swapped += 1
            sequence.swapped = self.cache.swap_out(sequence.seq_id)
        else:
            self.cache.discard(sequence.seq_id)
            sequence.forget()
        sequence.is_running, sequence.reserved, sequence.drafts = False, 0, []
        sequence.request.metrics.num_preemptions += 1
        self.add([sequence])

    def requeue(self) -> None:
        """Everyone back to the queue after a failed step: states may be half written."""
        for sequence in self.running:
            self.cache.discard(sequence.seq_id)
            sequence.forget()
            sequence.is_running, sequence.reserved = False, 0
        self.add(s for s in self.running if s.finish_reason is None)
        self.running = []

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Room for ``tokens`` rows; sequences behind give way, then this one itself."""
        while not self.cache.reserve(sequence.seq_id, tokens):
            victim = self.running[-1]
            self.preempt(victim)
            if victim is sequence:
                return False
        sequence.reserved = -(-tokens // self.options.block_size) * self.options.block_size
        return True

    def _piece(self, sequence: Sequence, budget: int) -> Work:
        """The next tokens of a prompt; its blocks were reserved at admission."""
        start, tokens = sequence.num_computed, len(sequence.tokens)
        count = min(tokens - start, budget)
        self.cache.commit(sequence.seq_id, start)
        saves = self.cache.plan_saves(sequence.seq_id, start, start + count)
        lead, sequence.lead = sequence.lead, False
        return Work(sequence, start, count, [], saves, start + count == tokens, lead, count)

    def _admit(self, work: list[Work], budget: int) -> None:
        """Seat waiting sequences in order until one does not fit."""
        # Siblings of a prompt that is still being read wait for it: then the cache has it.
        reading = {
            id(s.request)
            for s in self.running
            if s.num_computed < s.num_prompt and not s.output_ids
        }
        later: list[tuple[int, int, Sequence]] = []
        while self._waiting and budget > 0 and len(self.running) < self.options.max_num_seqs:
            entry = heapq.heappop(self._waiting)
            sequence = entry[2]
            if sequence.finish_reason is not None:
                continue
            waits = self.options.enable_prefix_caching and not sequence.output_ids
            if waits and id(sequence.request) in reading:
                later.append(entry)
                continue
            if not self._seat(sequence):
                later.append(entry)
                break
            if sequence.num_computed < sequence.num_prompt:
                reading.add(id(sequence.request))
            sequence.is_running = True
            insort(self.running, sequence, key=_by_order)
            piece = self._piece(sequence, budget)
            budget -= max(1, piece.count)
            work.append(piece)
        for entry in later:
            heapq.heappush(self._waiting, entry)

    def _seat(self, sequence: Sequence) -> bool:
        """A slot and blocks for all known tokens, from the cache as far as it knows them."""
        cache, tokens = self.cache, sequence.tokens
        swapped = sequence.swapped is not None
        if sequence.swapped is not None:
            if not cache.swap_in(sequence.seq_id, sequence.swapped):
                return False
            sequence.swapped = None
        else:
            most = 0 if sequence.request.needs_every_row else len(tokens)
            salt = sequence.request.salt
            room = len(tokens) + self._ahead
            cached = cache.begin(sequence.seq_id, tokens, salt=salt, max_cached=most, room=room)
            if cached is None:
                return False
            sequence.num_computed = cached
            sequence.lead = cached > 0
            if sequence.request.metrics.num_cached_tokens is None:
                sequence.request.metrics.num_cached_tokens = cached
        if not cache.reserve(sequence.seq_id, len(tokens) + self._ahead):
            if swapped:
                sequence.swapped = cache.swap_out(sequence.seq_id)
            else:
                cache.discard(sequence.seq_id)
                sequence.forget()
            return False
        sequence.reserved = len(tokens) + self._ahead
        return True
