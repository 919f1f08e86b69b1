"""EngineOptions: the limits and the vocabulary of one engine, already decided."""

from __future__ import annotations

from dataclasses import dataclass

from qnext.engine.speculative import DraftOverride


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What the step loop may use; llm.py decides the values.

    Attributes:
        vocab_size: ids that may be sampled; larger ones are padding rows.
        unused_ids: ids below ``vocab_size`` that no token has.
        max_model_len: most tokens of a sequence, prompt included.
        eos_token_ids: end tokens of the model.
        max_num_seqs: sequences that run at the same time.
        max_num_batched_tokens: prompt tokens per prefill step.
        num_speculative_tokens: MTP drafts per step.
        seed: of the seeds given to requests that bring none.
        draft_override: replaces drafts, for tests.
    """

    vocab_size: int
    max_model_len: int
    unused_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    num_speculative_tokens: int = 0
    seed: int = 0
    draft_override: DraftOverride | None = None
