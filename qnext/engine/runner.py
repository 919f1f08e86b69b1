"""Runner: the rows that the scheduler chose through the model, then sampling, verification, drafts.

Decides nothing about who runs. All sequences of a step go through one forward: prompts in pieces,
single tokens and drafts under verification are rows of one packed batch.
"""

from __future__ import annotations

import logging
import time
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from qnext.engine.cache import CacheManager
from qnext.engine.options import EngineOptions
from qnext.engine.request import Sequence
from qnext.engine.sampler import Sampled, Sampler, top_logprobs
from qnext.engine.sampling_state import Row
from qnext.engine.scheduler import Work
from qnext.engine.speculative import Drafter, Span
from qnext.engine.stats import EngineStats, count_drafts
from qnext.engine.tensors import BlockTables
from qnext.layers.model import CausalLM
from qnext.layers.packed import PackedBatch
from qnext.layers.state import ModelState

log = logging.getLogger(__name__)

_PROMPT_LOGPROB_ROWS = 128
"""Prompt rows whose logits exist at the same time."""

NOT_FINITE = "the model gave a logit that is not finite"
NO_TOKEN = "the parameters together allow no token"


class Runner:
    """Runs one step at a time.

    Args:
        model: in eval mode.
        options: limits and vocabulary.
        state: blocks and slots.
        cache: says which are whose, and hears how far each sequence has come.
        stats: counters to keep.
    """

    def __init__(
        self,
        model: CausalLM,
        options: EngineOptions,
        state: ModelState,
        cache: CacheManager,
        stats: EngineStats,
    ) -> None:
        self.model, self.options, self.stats = model, options, stats
        self.state, self.cache = state, cache
        self.device = state.hidden.device
        self.sampler = Sampler(options.vocab_size, options.unused_ids)
        longest = options.max_model_len + options.num_speculative_tokens + 1
        self._tables = BlockTables(cache, state.num_slots, -(-longest // options.block_size) + 1)
        self._drafter: Drafter | None = None
        if options.num_speculative_tokens:
            self._drafter = Drafter(model, options, state, self._tables)

    def run(self, work: list[Work], num_drafts: int) -> None:
        """One step: afterwards every sequence is advanced, sampled, and has new drafts.

        Args:
            work: what to run.
            num_drafts: drafts to propose for each sequence that sampled.
        """
        leases = self.cache.leases
        slots = [leases[w.sequence.seq_id].slot for w in work]
        plain = all(w.num_rows == 1 and w.samples and not w.saves for w in work)
        hidden, batch, rows = self._forward(work, slots)
        if plain:
            picked, sampling = list(range(len(work))), [w.sequence.row for w in work]
        else:
            first = 0
            for w in work:
                if w.sequence.request.prompt_logprobs is not None:
                    self._prompt_logprobs(w, hidden, first)
                first += w.num_rows
            picked, sampling = _sampled_rows(work)
        sampled: Sampled | None = None
        if sampling:
            sampled = self.sampler(self.model.logits(self._pick(hidden, picked, rows)), sampling)
        kept = self._advance(work, sampled)
        if batch is not None:
            if any(w.drafts for w in work):
                self.state.commit(batch, kept)
            leads = self._leads(work, slots)
            if plain:
                self.state.hidden.index_copy_(
                    0, self._ids(slots), hidden.to(self.state.hidden.dtype)
                )
            else:
                self._remember(work, slots, hidden, kept)
        else:
            leads = self._leads(work, slots)
        size = self.options.block_size
        for w in work:
            sequence, done = w.sequence, w.sequence.num_computed
            # In decoding the cache hears of it only when a block was filled.
            if w.count != 1 or w.saves or done // size != sequence.committed // size:
                self.cache.commit(sequence.seq_id, done)
                sequence.committed = done
        if self._drafter is not None:
            self._drafter.extend(hidden, self._spans(work, slots, kept, num_drafts), leads)

    def _forward(
        self, work: list[Work], slots: list[int]
    ) -> tuple[Tensor, PackedBatch | None, Tensor]:
        """Hidden states of all rows, then the stored ones of sequences without rows.

        Returns:
            (T, H) hidden states, the batch (None without rows), (n, H) stored ones.
        """
        live = list(zip(work, slots, strict=True))
        stored = [slot for w, slot in live if not w.num_rows]
        rows = self.state.hidden[:0]
        if stored:
            rows = self.state.hidden[stored]
            live = [(w, slot) for w, slot in live if w.num_rows]
        if not live:
            return self.state.hidden[:0], None, rows
        ids: list[int] = []
        lengths: list[int] = []
        starts: list[int] = []
        saves: list[tuple[int, int, int]] = []
        drafting = False
        for n, (w, _) in enumerate(live):
            start = w.start
            if w.count == 1:
                ids.append(w.sequence.tokens[start])
            else:
                ids += w.sequence.tokens[start : start + w.count]
            if w.drafts:
                ids += w.drafts
                drafting = True
            lengths.append(w.num_rows)
            starts.append(start)
            if w.saves:
                saves += [(n, position - start, slot) for position, slot in w.saves]
        live_slots = [slot for _, slot in live]
        longest = max(start + length for start, length in zip(starts, lengths, strict=True))
        batch = PackedBatch.cached(
            lengths, starts, live_slots,
            self._tables.rows([w.sequence.seq_id for w, _ in live], live_slots, longest),
            self.options.block_size,
            provisional=[bool(w.drafts) for w, _ in live] if drafting else (),
            saves=saves, device=self.device,
        )  # fmt: skip
        wanted = self._wanted(live, batch, saves)
        hidden = self.model.hidden_states(self._ids(ids), batch, self.state, wanted=wanted)
        return hidden, batch, rows

    def _wanted(
        self,
        live: list[tuple[Work, int]],
        batch: PackedBatch,
        saves: list[tuple[int, int, int]],
    ) -> list[int] | None:
        """Rows of a step with prompts that are needed at the end: last ones and saved ones."""
        if self._drafter is not None or batch.max_length == 1:
            return None
        if any(w.sequence.request.prompt_logprobs is not None for w, _ in live):
            return None
        first = [0, *accumulate(batch.lengths)]
        ends = {end - 1 for end in first[1:]}
        return sorted(ends | {first[n] + row - 1 for n, row, _ in saves})

    def _pick(self, hidden: Tensor, picked: list[int], stored: Tensor) -> Tensor:
        """The rows that are sampled; negative ones count among the stored rows."""
        if not len(stored):
            return hidden if len(picked) == len(hidden) else hidden[picked]
        both = torch.cat([hidden, stored])
        return both[[row if row >= 0 else len(hidden) - row - 1 for row in picked]]

    def _advance(self, work: list[Work], sampled: Sampled | None) -> list[int]:
        """Give every sequence its tokens; how many rows of each turned out to be right."""
        now = time.monotonic()
        kept: list[int] = []
        first = 0
        for w in work:
            count = w.count
            if w.samples:
                assert sampled is not None
                # A sequence without rows samples from the hidden state of its last token.
                if w.drafts:
                    count += max(0, self._verify(w, sampled, first, now) - 1)
                    first += 1 + len(w.drafts)
                else:
                    if w.sequence.finish_reason is None:
                        self._emit(w.sequence, sampled, first, now)
                    first += 1
            w.sequence.num_computed = w.start + count
            if w.num_rows:
                kept.append(count)
        return kept

    def _verify(self, w: Work, sampled: Sampled, first: int, now: float) -> int:
        """Emit tokens from row ``first`` on while they equal the drafts; how many were emitted."""
        sequence, drafts, count = w.sequence, w.drafts, 0
        while sequence.finish_reason is None:
            self._emit(sequence, sampled, first + count, now)
            count += 1
            if count > len(drafts) or sampled.tokens[first + count - 1] != drafts[count - 1]:
                break
        emitted = sampled.tokens[first : first + count]
        right = sum(d == token for d, token in zip(drafts, emitted, strict=False))
        for counts in (self.stats, sequence.request.metrics):
            count_drafts(counts.num_drafted, counts.num_accepted, len(drafts), right)
        return count

    def _emit(self, sequence: Sequence, sampled: Sampled, row: int, now: float) -> None:
        """Give a sequence its sampled token, or fail it alone."""
        if not sampled.valid[row]:
            finite = sampled.finite[row]
            error = sequence.sampling.failure or NO_TOKEN if finite else NOT_FINITE
            sequence.finish("error", error=error)
            sequence.poisoned = not finite
            log.warning("request failed id=%s error=%s", sequence.request.request_id, error)
            return
        sequence.append(sampled.tokens[row], sampled.logprobs[row])
        self.stats.num_generated_tokens += 1
        metrics = sequence.request.metrics
        metrics.num_generated_tokens += 1
        if metrics.first_token_time is None:
            metrics.first_token_time = now
        elif metrics.last_token_time is not None:
            self.stats.inter_token.add(now - metrics.last_token_time)
        metrics.last_token_time = now

    def _leads(self, work: list[Work], slots: list[int]) -> Tensor:
        """(n, H) hidden states of the last cached token of newly attached sequences."""
        going = [(w, slot) for w, slot in zip(work, slots, strict=True) if w.lead]
        # Those that ended with their first token have no span (see ``_spans``).
        index = [slot for w, slot in going if w.sequence.finish_reason is None]
        return self.state.hidden[index] if index and self._drafter else self.state.hidden[:0]

    def _remember(
        self, work: list[Work], slots: list[int], hidden: Tensor, kept: list[int]
    ) -> None:
        """Keep the hidden state of the last token of every slot, and of the snapshots."""
        to: list[int] = []
        rows: list[int] = []
        first, live = 0, 0
        for w, slot in zip(work, slots, strict=True):
            if w.num_rows:
                to.append(slot)
                rows.append(first + kept[live] - 1)
                live += 1
                for position, snapshot in w.saves:
                    to.append(snapshot)
                    rows.append(first + position - w.start - 1)
            first += w.num_rows
        whole = len(rows) == len(hidden)
        found = hidden if whole and rows == list(range(len(rows))) else hidden[rows]
        self.state.hidden.index_copy_(0, self._ids(to), found.to(self.state.hidden.dtype))

    def _spans(
        self, work: list[Work], slots: list[int], kept: list[int], num_drafts: int
    ) -> list[Span]:
        """Rows from which the MTP cache goes on, and how many drafts each sequence gets."""
        spans: list[Span] = []
        first, live = 0, 0
        for w, slot in zip(work, slots, strict=True):
            count = 0
            if w.num_rows:
                count = kept[live]
                live += 1
            if w.sequence.finish_reason is None:
                drafts = num_drafts if w.samples else 0
                left = w.sequence.max_total - len(w.sequence.tokens) - 1
                spans.append(
                    Span(w.sequence, slot, (first, first + count), w.start, w.lead,
                         max(0, min(drafts, left)))
                )  # fmt: skip
            first += w.num_rows
        return spans

    def _prompt_logprobs(self, w: Work, hidden: Tensor, first: int) -> None:
        """Log-probabilities of the prompt tokens that follow the rows of this piece."""
        request = w.sequence.request
        found, count = request.prompt_logprobs, request.params.prompt_logprobs
        if found is None or count is None or len(found) != w.start + 1:
            return
        last = min(first + w.count, first + w.sequence.num_prompt - 1 - w.start)
        for start in range(first, last, _PROMPT_LOGPROB_ROWS):
            stop = min(last, start + _PROMPT_LOGPROB_ROWS)
            logits = self.model.logits(hidden[start:stop])[:, : self.options.vocab_size]
            place = w.start + start - first + 1
            chosen = self._ids(w.sequence.tokens[place : place + stop - start])
            raws = top_logprobs(logits, chosen, [count] * (stop - start))
            found += [request.logprobs_dict(raw) for raw in raws]

    def _ids(self, ids: list[int]) -> Tensor:
        return torch.from_numpy(np.array(ids, np.int64)).to(self.device)


def _sampled_rows(work: list[Work]) -> tuple[list[int], list[Row]]:
    """Row numbers that are sampled (-1, -2, ... for sequences without rows), and whose they are."""
    picked: list[int] = []
    sampling: list[Row] = []
    first, stored = 0, 0
    for w in work:
        if w.samples:
            state = w.sequence.sampling
            sampling.append(w.sequence.row)
            if w.count:
                picked.append(first + w.count - 1)
            else:
                stored += 1
                picked.append(-stored)
            for n in range(len(w.drafts)):
                sampling.append(Row(state, w.drafts[: n + 1]))
                picked.append(first + w.count + n)
        first += w.num_rows
    return picked, sampling
