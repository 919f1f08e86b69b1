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

import torch
from torch import Tensor

from qnext.engine.request import Sequence as Generation
from qnext.engine.sampler import argmax, greedy_drafts
from qnext.engine.sampling_state import Row
from qnext.errors import ConfigError
from qnext.layers.model import CausalLM
from qnext.layers.packed import PackedBatch
from qnext.layers.state import ModelState

MAX_DRAFTS = 8
AUTO_DRAFTS = 1
"""Drafts for ``num_speculative_tokens="auto"`` on a model with MTP."""

DraftOverride = Callable[[Generation, list[int]], list[int]]
"""Tests replace drafts with it, to force rejections where they want them."""


def resolve_num_drafts(asked: int | str | None, *, has_mtp: bool) -> int:
    """Drafts per step: None and 0 mean none, "auto" means what pays if the model has MTP.

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


@dataclass(slots=True)
class Span:
    """Newly verified positions of one sequence: rows of hidden states that begin at ``start``.

    Attributes:
        sequence: whose.
        rows: (first, last + 1) in the packed hidden states.
        start: absolute position of the first row.
        num_drafts: tokens to draft after the last row, may be 0.
    """

    sequence: Generation
    rows: tuple[int, int]
    start: int
    num_drafts: int = 0

    @property
    def num_rows(self) -> int:
        """How many rows."""
        return self.rows[1] - self.rows[0]


class Drafter:
    """Keeps the MTP cache on verified tokens and drafts greedily from it."""

    def __init__(
        self,
        model: CausalLM,
        *,
        vocab_size: int,
        override: DraftOverride | None = None,
    ) -> None:
        self.model, self.vocab_size, self.override = model, vocab_size, override

    def extend(self, hidden: Tensor, spans: Sequence[Span], state: ModelState) -> None:
        """Run MTP over the spans and leave new drafts in their sequences.

        The pair at position i is (H_i, token i + 1), so every span's sequence must already hold
        the token after its last row. Rows that earlier drafts wrote are overwritten.

        Args:
            hidden: (T, H) of the main model after its final norm.
            spans: which rows of it, per sequence.
            state: cache whose ``mtp`` part is extended.
        """
        next_ids: list[int] = []
        for span in spans:
            next_ids += span.sequence.tokens[span.start + 1 : span.start + 1 + span.num_rows]
            span.sequence.drafts = []
        lengths = [span.num_rows for span in spans]
        if not _whole(spans, hidden.shape[0]):
            hidden = torch.cat([hidden[first:last] for first, last in (s.rows for s in spans)])
        ids = torch.tensor(next_ids, dtype=torch.long, device=hidden.device)
        out = self._run(hidden, ids, [s.start for s in spans], lengths, spans, state)
        ends = list(accumulate(lengths))
        drafting = [n for n, span in enumerate(spans) if span.num_drafts]
        if drafting:
            rows = out[[ends[n] - 1 for n in drafting]]
            self._draft(rows, [spans[n] for n in drafting], state)

    def _draft(self, hidden: Tensor, spans: Sequence[Span], state: ModelState) -> None:
        """Steps 1..k: a draft from each row of ``hidden`` (N, H), fed back as the next row."""
        active = list(range(len(spans)))
        ruled = any(span.sequence.sampling.constraint is not None for span in spans)
        owners: list[int] = []
        found: list[Tensor] = []
        place = 0
        while True:
            logits = self.model.logits(hidden)[:, : self.vocab_size].float()
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
            contexts = [s.start + s.num_rows + place - 1 for s in going]
            hidden = self._run(hidden, ids, contexts, [1] * len(going), going, state)
        if found:
            for n, token in zip(owners, torch.cat(found).tolist(), strict=True):
                spans[n].sequence.drafts.append(token)
        if self.override is not None:
            for span in spans:
                span.sequence.drafts = self.override(span.sequence, span.sequence.drafts)

    def _run(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        contexts: Sequence[int],
        lengths: Sequence[int],
        spans: Sequence[Span],
        state: ModelState,
    ) -> Tensor:
        batch = PackedBatch.of(
            lengths,
            context_lens=contexts,
            slots=[span.sequence.seat for span in spans],
            device=hidden.device,
        )
        return self.model.draft_states(hidden, next_ids, batch, state)


def _whole(spans: Sequence[Span], length: int) -> bool:
    """Whether the spans are all ``length`` rows in order, so that nothing need be gathered."""
    end = 0
    for span in spans:
        if span.rows[0] != end:
            return False
        end = span.rows[1]
    return end == length
