"""Multi-token prediction: one MTP layer drafts k tokens, the main model verifies them in one pass.

Drafting follows spec 6.2. Verification samples the target distribution at every row with the
sequence's own random number and keeps drafts as long as they equal the sample. For a one-hot
draft distribution that is exact rejection sampling (accept with p(d), otherwise p without d,
spec 6.3), and it leaves the sampled text the same as without drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qnext.engine.request import Sequence as Generation
from qnext.engine.sampler import argmax, greedy_drafts
from qnext.engine.sampling_state import Row
from qnext.errors import ConfigError
from qnext.layers.model import CausalLM
from qnext.layers.packed import PackedBatch
from qnext.layers.state import ModelState

if TYPE_CHECKING:
    from qnext.engine.options import EngineOptions
    from qnext.engine.scheduler import Work
    from qnext.engine.tensors import BlockTables

MAX_DRAFTS = 8
AUTO_DRAFTS = 3
"""Most drafts for ``num_speculative_tokens="auto"``; ``DraftPolicy`` chooses 0 to so many."""

_TRIES = 4
"""Steps that each k is measured for before one is chosen."""

_RETRY = 64
"""Steps between trying another k again."""

DraftOverride = Callable[[Generation, list[int]], list[int]]
"""Tests replace drafts with it, to force rejections where they want them."""


def resolve_num_drafts(asked: int | str | None, *, has_mtp: bool) -> int:
    """Drafts per step: None and 0 mean none, "auto" means up to what may pay.

    Raises:
        ConfigError: not 0..8, or drafts asked of a model without MTP weights.
    """
    if asked == "auto":
        return AUTO_DRAFTS if has_mtp else 0
    if asked is None:
        return 0
    if isinstance(asked, bool) or not isinstance(asked, int) or not 0 <= asked <= MAX_DRAFTS:
        raise ConfigError(
            f"num_speculative_tokens={asked!r} must be 0..{MAX_DRAFTS}, None or 'auto'"
        )
    if asked and not has_mtp:
        raise ConfigError(
            f"num_speculative_tokens={asked} needs MTP weights, and this model has none",
            hint="leave num_speculative_tokens at 0",
        )
    return asked


class DraftPolicy:
    """How many drafts the next step proposes.

    Fixed, or chosen by measurement: for every k the tokens that a decoding step gave and the time
    it took, as moving averages for batches of about the same size. Longer contexts and other
    texts change both, so the measurements follow. A k that was not tried lately is tried again
    now and then; 0 is one of them, so drafting stops where it does not pay.

    Args:
        most: largest k.
        adaptive: whether to choose.
    """

    def __init__(self, most: int, adaptive: bool) -> None:
        self._most, self._adaptive = most, adaptive and most > 0
        self._rates: dict[int, list[_Rate]] = {}
        self._steps = 0
        self._size = 1
        self._chosen = most

    def choose(self, num_running: int) -> int:
        """Drafts for the next step."""
        if not self._adaptive:
            return self._most
        self._steps += 1
        self._size = max(1, num_running)
        rates = self._of(self._size)
        for k, rate in enumerate(rates):
            if rate.count < _TRIES:
                self._chosen = k
                return k
        if self._steps % _RETRY < 2:  # two in a row: the first only leaves drafts for the second
            self._chosen = self._steps // _RETRY % (self._most + 1)
        else:
            self._chosen = max(range(self._most + 1), key=lambda k: rates[k].tokens_per_second)
        return self._chosen

    def measured(self, work: Sequence[Work], seconds: float) -> None:
        """Take in a decoding step: its drafts were proposed by the step before."""
        if not self._adaptive or not work:
            return
        k = max(len(w.drafts) for w in work)
        if k != self._chosen:
            return  # a change of k: the time is that of one k, the drafts are those of another
        tokens = sum(w.sequence.num_computed - w.start for w in work)
        self._of(self._size)[k].add(tokens, seconds)

    def _of(self, size: int) -> list[_Rate]:
        bucket = (size - 1).bit_length()
        if bucket not in self._rates:
            self._rates[bucket] = [_Rate() for _ in range(self._most + 1)]
        return self._rates[bucket]


class _Rate:
    """Moving averages of tokens and seconds of a step."""

    def __init__(self) -> None:
        self.count, self.tokens, self.seconds = 0, 0.0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.count += 1
        share = max(1 / self.count, 0.05)
        self.tokens += share * (tokens - self.tokens)
        self.seconds += share * (seconds - self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class Span:
    """Newly verified tokens of one sequence, from which its MTP cache goes on.

    Attributes:
        sequence: whose; it already holds the token after the last row.
        slot: its state slot.
        rows: (first, last + 1) in the packed hidden states; may be empty.
        start: absolute position of the first row.
        lead: the row of position ``start - 1`` comes first, from a stored hidden state.
        num_drafts: tokens to draft after the last row, may be 0.
    """

    sequence: Generation
    slot: int
    rows: tuple[int, int]
    start: int
    lead: bool = False
    num_drafts: int = 0

    @property
    def num_rows(self) -> int:
        """How many rows, with the leading one."""
        return self.rows[1] - self.rows[0] + self.lead

    @property
    def first(self) -> int:
        """Position of the first row, with the leading one."""
        return self.start - self.lead


class Drafter:
    """Keeps the MTP cache on verified tokens and drafts greedily from it."""

    def __init__(
        self, model: CausalLM, options: EngineOptions, state: ModelState, tables: BlockTables
    ) -> None:
        self.model, self.options, self.state, self._tables = model, options, state, tables

    def extend(self, hidden: Tensor, spans: Sequence[Span], leads: Tensor) -> None:
        """Run MTP over the spans and leave new drafts in their sequences.

        The pair at position i is (H_i, token i + 1). Rows that earlier drafts wrote are
        overwritten.

        Args:
            hidden: (T, H) of the main model after its final norm.
            spans: which rows of it, per sequence.
            leads: (n, H) stored hidden states of the spans with ``lead``, in order.
        """
        for span in spans:
            span.sequence.drafts = []
        spans = [span for span in spans if span.num_rows]
        if not spans:
            return
        next_ids: list[int] = []
        for span in spans:
            begin = span.first + 1
            next_ids += span.sequence.tokens[begin : begin + span.num_rows]
        lengths = [span.num_rows for span in spans]
        if len(leads) or not _whole(spans, len(hidden)):
            pieces: list[Tensor] = []
            lead = 0
            for span in spans:
                if span.lead:
                    pieces.append(leads[lead : lead + 1])
                    lead += 1
                pieces.append(hidden[span.rows[0] : span.rows[1]])
            hidden = torch.cat(pieces)
        ids = torch.tensor(next_ids, dtype=torch.long).to(hidden.device)
        out = self._run(hidden, ids, [s.first for s in spans], lengths, spans)
        ends = list(accumulate(lengths))
        drafting = [n for n, span in enumerate(spans) if span.num_drafts]
        if drafting:
            rows = out[[ends[n] - 1 for n in drafting]]
            self._draft(rows, [spans[n] for n in drafting])

    def _draft(self, hidden: Tensor, spans: Sequence[Span]) -> None:
        """Steps 1..k: a draft from each row of ``hidden`` (N, H), fed back as the next row."""
        active = list(range(len(spans)))
        ruled = any(span.sequence.sampling.constraint is not None for span in spans)
        owners: list[int] = []
        found: list[Tensor] = []
        place = 0
        while True:
            logits = self.model.logits(hidden)[:, : self.options.vocab_size].float()
            if ruled:  # the rules of the next draft depend on this one
                chosen = [spans[n].sequence for n in active]
                ids = greedy_drafts(logits, [Row(s.sampling, s.drafts) for s in chosen])
                for sequence, token in zip(chosen, ids.tolist(), strict=True):
                    sequence.drafts.append(token)
            else:
                ids = argmax(logits)
                owners += active
                found.append(ids)
            place += 1
            rows = [row for row, n in enumerate(active) if spans[n].num_drafts > place]
            if not rows:
                break
            if len(rows) < len(active):
                hidden, ids, active = hidden[rows], ids[rows], [active[row] for row in rows]
            going = [spans[n] for n in active]
            contexts = [s.first + s.num_rows + place - 1 for s in going]
            hidden = self._run(hidden, ids, contexts, [1] * len(going), going)
        if found:
            for n, token in zip(owners, torch.cat(found).tolist(), strict=True):
                spans[n].sequence.drafts.append(token)
        if self.options.draft_override is not None:
            for span in spans:
                sequence = span.sequence
                sequence.drafts = self.options.draft_override(sequence, sequence.drafts)

    def _run(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        contexts: Sequence[int],
        lengths: Sequence[int],
        spans: Sequence[Span],
    ) -> Tensor:
        slots = [span.slot for span in spans]
        longest = 1 + max(c + n for c, n in zip(contexts, lengths, strict=True))
        batch = PackedBatch.cached(
            lengths, contexts, slots,
            self._tables.rows([span.sequence.seq_id for span in spans], slots, longest),
            self.options.block_size, kv_shift=1, with_states=False, device=hidden.device,
        )  # fmt: skip
        return self.model.draft_states(hidden, next_ids, batch, self.state)


def _whole(spans: Sequence[Span], length: int) -> bool:
    """Whether the spans are all ``length`` rows in order, so that nothing need be gathered."""
    end = 0
    for span in spans:
        if span.rows[0] != end:
            return False
        end = span.rows[1]
    return end == length
