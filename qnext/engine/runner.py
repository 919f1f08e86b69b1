"""Runner: one forward over some sequences, then sampling, verification and drafting.

Decides nothing about who runs; generate.py does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qnext.engine.options import EngineOptions
from qnext.engine.request import Sequence
from qnext.engine.sampler import Sampled, Sampler, top_logprobs
from qnext.engine.sampling_state import Row
from qnext.engine.slots import CacheSlots
from qnext.engine.speculative import Drafter, Span
from qnext.engine.stats import EngineStats, count_drafts
from qnext.layers.model import CausalLM
from qnext.layers.packed import PackedBatch

log = logging.getLogger(__name__)

_PROMPT_LOGPROB_ROWS = 128
"""Prompt rows whose logits exist at the same time."""

NOT_VALID = "the model gave a logit that is not finite, or the parameters allow no token"

Fork = Callable[[Sequence], list[Sequence]]
"""Seats waiting completions of a sequence's prompt and returns them."""


class Runner:
    """Runs sequences that have slots.

    Args:
        model: in eval mode.
        options: limits and vocabulary.
        slots: the cache.
        stats: counters to keep.
    """

    def __init__(
        self, model: CausalLM, options: EngineOptions, slots: CacheSlots, stats: EngineStats
    ) -> None:
        self.model, self.options, self.slots, self.stats = model, options, slots, stats
        self.device = next(model.parameters()).device
        self._sampler = Sampler(options.vocab_size, options.unused_ids)
        self._drafter: Drafter | None = None
        if options.num_speculative_tokens:
            self._drafter = Drafter(
                model, vocab_size=options.vocab_size, override=options.draft_override
            )

    def prefill(self, sequences: list[Sequence], fork: Fork) -> None:
        """Run the next piece of each prompt, up to the token budget, and sample where it ends."""
        spans = self._pieces(sequences)
        state = self.slots.grown(max(s.start + s.num_rows for s in spans))
        ids = [token for s in spans for token in s.sequence.tokens[s.start : s.start + s.num_rows]]
        batch = self._batch([s.num_rows for s in spans], [s.sequence for s in spans])
        hidden = self.model.hidden_states(self._ids(ids), batch, state)
        ends: list[tuple[Span, Sequence]] = []
        for span in spans:
            sequence = span.sequence
            sequence.num_computed += span.num_rows
            self._prompt_logprobs(span, hidden)
            if sequence.num_computed == len(sequence.tokens):
                ends.append((span, sequence))
                ends += [(span, sibling) for sibling in fork(sequence)]
        if ends:
            logits = self.model.logits(hidden[[span.rows[1] - 1 for span, _ in ends]])
            sampled = self._sampler(logits, [Row(sequence.sampling) for _, sequence in ends])
            for row, (_, sequence) in enumerate(ends):
                self._emit(sequence, sampled, row)
        if self._drafter is not None:
            # A finished parent is still extended, since its siblings copy its MTP cache.
            ended = {id(span) for span, _ in ends}
            needed = {id(span) for span, sequence in ends if sequence.finish_reason is None}
            spans = [s for s in spans if id(s) in needed or id(s) not in ended]
            self._draft(hidden, spans)
        self._copy_to_siblings(hidden, ends)

    def decode(self, sequences: list[Sequence]) -> None:
        """Run the last token and the drafts of each sequence; keep what the model agrees with."""
        ids: list[int] = []
        rows: list[Row] = []
        lengths: list[int] = []
        for sequence in sequences:
            drafts = sequence.drafts
            ids.append(sequence.tokens[-1])
            rows.append(Row(sequence.sampling))
            if drafts:
                ids += drafts
                rows += [Row(sequence.sampling, drafts[: n + 1]) for n in range(len(drafts))]
            lengths.append(1 + len(drafts))
        trace = len(ids) > len(sequences)
        state = self.slots.grown(
            max(s.num_computed + n for s, n in zip(sequences, lengths, strict=True))
        )
        batch = self._batch(lengths, sequences, trace=trace)
        hidden = self.model.hidden_states(self._ids(ids), batch, state)
        sampled = self._sampler(self.model.logits(hidden), rows)
        first = 0
        kept: list[int] = []
        spans: list[Span] = []
        for sequence, length in zip(sequences, lengths, strict=True):
            count = self._verify(sequence, sampled, first)
            kept.append(count)
            if sequence.finish_reason is None:
                spans.append(Span(sequence, (first, first + count), sequence.num_computed))
            sequence.num_computed += count
            first += length
        if trace:
            state.commit(batch, kept)
        if self._drafter is not None:
            self._draft(hidden, spans)

    def _pieces(self, sequences: list[Sequence]) -> list[Span]:
        """The next rows of each prompt, in order, as far as the token budget goes."""
        budget, row = self.options.max_num_batched_tokens, 0
        spans: list[Span] = []
        for sequence in sequences:
            start = sequence.num_computed
            count = min(len(sequence.tokens) - start, budget)
            spans.append(Span(sequence, (row, row + count), start))
            row += count
            budget -= count
            if not budget:
                break
        return spans

    def _verify(self, sequence: Sequence, sampled: Sampled, first: int) -> int:
        """Emit tokens from row ``first`` on while they equal the drafts; how many rows held."""
        drafts, count = sequence.drafts, 0
        while sequence.finish_reason is None:
            self._emit(sequence, sampled, first + count)
            count += 1
            if count > len(drafts) or sampled.tokens[first + count - 1] != drafts[count - 1]:
                break
        if drafts:
            emitted = sampled.tokens[first : first + count]
            right = sum(d == token for d, token in zip(drafts, emitted, strict=False))
            for counts in (self.stats, sequence.request.metrics):
                count_drafts(counts.num_drafted, counts.num_accepted, len(drafts), right)
        return count

    def _emit(self, sequence: Sequence, sampled: Sampled, row: int) -> None:
        """Give a sequence its sampled token, or fail it alone."""
        request = sequence.request
        if not sampled.valid[row]:
            error = sequence.sampling.failure or NOT_VALID
            sequence.finish("error", error=error)
            log.warning("request failed id=%s error=%s", request.request_id, error)
            return
        sequence.append(sampled.tokens[row], sampled.logprobs[row])
        self.stats.num_generated_tokens += 1
        request.metrics.num_generated_tokens += 1
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = time.monotonic()

    def _draft(self, hidden: Tensor, spans: list[Span]) -> None:
        """Extend the MTP cache over ``spans`` and leave drafts in their sequences."""
        if self._drafter is None or not spans:
            return
        for span in spans:
            span.num_drafts = self._num_drafts(span)
        state = self.slots.grown(max(s.start + s.num_rows + s.num_drafts for s in spans))
        self._drafter.extend(hidden, spans, state)

    def _num_drafts(self, span: Span) -> int:
        """Drafts worth making: none within a prompt, none past the sequence's last token."""
        sequence = span.sequence
        if len(sequence.tokens) != span.start + span.num_rows + 1:
            return 0
        left = sequence.max_total - len(sequence.tokens) - 1
        return max(0, min(self.options.num_speculative_tokens, left))

    def _copy_to_siblings(self, hidden: Tensor, ends: list[tuple[Span, Sequence]]) -> None:
        """Copy the prompt's state; each sibling's own first token redoes the last MTP row."""
        spans: list[Span] = []
        for span, sequence in ends:
            if sequence is not span.sequence and sequence.finish_reason is None:
                self.slots.state.copy_slot(span.sequence.seat, sequence.seat)
                last = span.rows[1]
                spans.append(Span(sequence, (last - 1, last), sequence.num_computed - 1))
        self._draft(hidden, spans)

    def _prompt_logprobs(self, span: Span, hidden: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow the rows of ``span``."""
        request = span.sequence.request
        found, count = request.prompt_logprobs, request.params.prompt_logprobs
        if found is None or count is None or len(found) != span.start + 1:
            return
        last = min(span.rows[1], span.rows[0] + span.sequence.num_prompt - 1 - span.start)
        for first in range(span.rows[0], last, _PROMPT_LOGPROB_ROWS):
            stop = min(last, first + _PROMPT_LOGPROB_ROWS)
            logits = self.model.logits(hidden[first:stop])[:, : self.options.vocab_size]
            start = span.start + first - span.rows[0] + 1
            chosen = self._ids(span.sequence.tokens[start : start + stop - first])
            raws = top_logprobs(logits, chosen, [count] * (stop - first))
            found += [request.logprobs_dict(raw) for raw in raws]

    def _batch(
        self, lengths: list[int], sequences: list[Sequence], *, trace: bool = False
    ) -> PackedBatch:
        return PackedBatch.of(
            lengths,
            context_lens=[sequence.num_computed for sequence in sequences],
            slots=[sequence.seat for sequence in sequences],
            trace=trace,
            device=self.device,
        )

    def _ids(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self.device)
