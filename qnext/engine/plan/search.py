"""The nearest settings that fit, for a plan that does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from qnext.engine.plan.footprint import ITEM_BYTES, WeightFormat
from qnext.engine.plan.request import PlanRequest, Suggestion, largest

SMALLEST_CHUNK = 256


def suggest(asked: PlanRequest) -> tuple[Suggestion, ...]:
    """Changes of which each alone makes the plan fit; where none does, a few that do together."""
    alone = []
    for changes in _contexts(asked):
        alone.append(_suggestion(changes))
    for changes in _savings(asked):
        if replace(asked, **changes).fits:
            alone.append(_suggestion(changes))
    return tuple(alone) or tuple(_together(asked))


def _contexts(asked: PlanRequest) -> Iterator[dict[str, Any]]:
    """The longest context for as many sequences, and the most sequences of this length."""
    tokens = _longest(asked, asked.max_model_len - 1)
    if tokens >= asked.block_size:
        yield {"max_model_len": tokens}
    # Zero sequences stand for "not even one".
    count = largest(asked.full_seqs - 1, lambda n: replace(asked, **_sequences(asked, n)).fits)
    if count:
        yield _sequences(asked, count)


def _longest(asked: PlanRequest, most: int) -> int:
    return largest(most, lambda n: replace(asked, max_model_len=n).fits)


def _sequences(asked: PlanRequest, count: int) -> dict[str, Any]:
    """``full_seqs=count``, and as many running ones if there were no more before."""
    same = asked.full_seqs == asked.max_num_seqs
    return {"full_seqs": count, **({"max_num_seqs": count} if same else {})}


def _savings(asked: PlanRequest) -> Iterator[dict[str, Any]]:
    """Settings that cost less memory, those that change results the least first."""
    if asked.max_num_seqs > asked.full_seqs:
        count = largest(
            asked.max_num_seqs - 1,
            lambda n: replace(asked, max_num_seqs=max(n, asked.full_seqs)).fits,
        )
        yield {"max_num_seqs": max(count, asked.full_seqs)}
    if asked.snapshots:
        yield {"snapshots": largest(asked.snapshots, lambda n: replace(asked, snapshots=n).fits)}
    chunk = 1 << (asked.max_num_batched_tokens - 1).bit_length()
    while chunk > SMALLEST_CHUNK:
        chunk //= 2
        if replace(asked, max_num_batched_tokens=chunk).fits:
            break
    if chunk < asked.max_num_batched_tokens:
        yield {"max_num_batched_tokens": chunk}
    if asked.num_speculative_tokens:
        yield {
            "num_speculative_tokens": largest(
                asked.num_speculative_tokens - 1,
                lambda n: replace(asked, num_speculative_tokens=n).fits,
            )
        }
    if asked.kv_layers and ITEM_BYTES[asked.kv_dtype] > 1:
        yield {"kv_cache_dtype": "fp8"}
    if asked.state_dtype == "float32" and "linear_attention" in asked.config.layer_types:
        yield {"state_dtype": "bfloat16"}
    for form in _formats(asked):
        yield {"weights": form}


def _formats(asked: PlanRequest) -> Iterator[WeightFormat]:
    """Weights in fewer bits: fp8, then int4 experts, then int4 everywhere."""
    form = asked.weights
    if ITEM_BYTES.get(form.dtype, 0) > 1:
        yield WeightFormat("fp8")
    if any(asked.config.sparse_layers) and "int4" not in (form.dtype, form.expert_dtype):
        yield WeightFormat("fp8", "int4", form.group_size)
    if form.dtype != "int4":
        yield WeightFormat("int4", None, form.group_size)


def _together(asked: PlanRequest) -> Iterator[Suggestion]:
    """Savings one on top of the other until the plan, or at least a shorter one, fits."""
    changes: dict[str, Any] = {}
    for saving in _savings(asked):
        changes |= saving
        if replace(asked, **changes).fits:
            for name in list(changes):  # what turns out not to be needed stays as it was
                fewer = {k: v for k, v in changes.items() if k != name}
                if replace(asked, **fewer).fits:
                    changes = fewer
            yield _suggestion(changes)
            return
    for one in (changes, changes | _sequences(asked, 1)):
        tokens = _longest(replace(asked, **one), asked.max_model_len)
        if tokens >= asked.block_size:
            yield _suggestion({**one, "max_model_len": tokens})
            return


def _suggestion(changes: dict[str, Any]) -> Suggestion:
    """The change in words."""
    texts = {
        "max_model_len": "a context of {:,} tokens",
        "full_seqs": "{:,} such sequences at once",
        "max_num_seqs": "max_num_seqs={}",
        "snapshots": "snapshots={}",
        "max_num_batched_tokens": "max_num_batched_tokens={}",
        "num_speculative_tokens": "num_speculative_tokens={}",
        "kv_cache_dtype": "kv_cache_dtype={}",
        "state_dtype": "state_dtype={}",
    }
    words = []
    for name, value in changes.items():
        if name == "weights":
            words.append(f"weights in {value.name}")
        elif name != "max_num_seqs" or "full_seqs" not in changes:
            words.append(texts[name].format(value))
    return Suggestion(changes, ", ".join(words))
