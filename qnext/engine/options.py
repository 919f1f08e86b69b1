"""EngineOptions: the limits and the vocabulary of one engine, already decided."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from qnext.engine.speculative import DraftOverride

Preemption = Literal["auto", "recompute", "swap"]


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
        block_size: tokens of a KV block.
        num_blocks: KV blocks; None for what ``max_num_seqs`` sequences of ``max_model_len`` need.
        num_snapshots: state slots for the prefix cache, beyond one for each running sequence.
        enable_prefix_caching: whether prompts may go on from what earlier requests left.
        snapshot_interval: tokens between snapshots of a prompt, beside those of the policy.
        kv_dtype: of keys and values; None for the model's.
        preemption: "auto", "recompute" or "swap": how a sequence gives way when blocks run out.
        adaptive_drafts: choose 0..num_speculative_tokens drafts for each step by measurement.
        host_cache_bytes: host memory for blocks and states that were evicted; 0 for none.
        disk_cache: folder where they go after that; it survives the process.
        disk_cache_bytes: most bytes there.
        weights_id: names the weights, for caches that outlive a process.
        check_interval: steps between checks of the cache's books (0.25 ms); 0 for never.
        full_checks: check everything, in time that grows with the cache: for tests.
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
    block_size: int = 16
    num_blocks: int | None = None
    num_snapshots: int = 64
    enable_prefix_caching: bool = True
    snapshot_interval: int | None = None
    kv_dtype: torch.dtype | None = None
    preemption: Preemption = "auto"
    adaptive_drafts: bool = False
    host_cache_bytes: int = 0
    disk_cache: Path | None = None
    disk_cache_bytes: int = 16 << 30
    weights_id: bytes = b""
    check_interval: int = 1024
    full_checks: bool = False
