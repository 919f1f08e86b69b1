"""The memory planner: how many KV blocks and state slots there are, and whether a request fits.

There is no ratio to guess. What must be there is counted (weights, workspaces, the running
sequences); what is left becomes prefix cache, shared out so that KV blocks and state snapshots
remember the same number of requests. docs/planning.md has the rule with the 80B's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qnext.config import ModelConfig
from qnext.engine.defaults import longest_context
from qnext.engine.plan import footprint
from qnext.engine.plan.devices import CONTEXT_BYTES, GIB, free_ram
from qnext.engine.plan.footprint import WeightFormat
from qnext.engine.plan.request import PlanRequest, Suggestion, largest
from qnext.engine.plan.search import suggest
from qnext.errors import ConfigError

BLOCK_SIZE = 16
PREFILL_TOKENS = {"cuda": 8192, "cpu": 2048}
RUNNING_SEQUENCES = {"cuda": 256, "cpu": 64}
CPU_POOL_BYTES = GIB
"""Pools on a CPU whose memory nobody named: a laptop has other work to do."""
EXPECTED_TOKENS = 4096
"""Prompt and output of a typical request, for sharing out the prefix cache."""
SNAPSHOTS_PER_REQUEST = 2
"""States kept of a remembered request: at the end of its prompt and at the end of its answer."""
CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")
STATE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class MemoryPlan:
    """How memory is divided.

    Attributes:
        request: what was asked for.
        num_blocks: KV blocks of every attention layer.
        num_snapshots: state slots beyond the running ones.
        parts: bytes by part, in all at most ``request.memory_bytes`` if it fits.
        suggestions: nearest settings that fit; empty if it fits.
    """

    request: PlanRequest
    num_blocks: int
    num_snapshots: int
    parts: Mapping[str, int]
    suggestions: tuple[Suggestion, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the promised sequences fit."""
        return self.request.fits

    @property
    def num_slots(self) -> int:
        """State slots, running sequences and snapshots together."""
        return self.request.max_num_seqs + self.num_snapshots

    @property
    def block_size(self) -> int:
        """Tokens of a KV block."""
        return self.request.block_size

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence."""
        return self.request.max_model_len

    @property
    def max_num_seqs(self) -> int:
        """Sequences that run at the same time."""
        return self.request.max_num_seqs

    @property
    def total_bytes(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters alone."""
        return sum(footprint.weight_bytes(self.request.config, self.request.weights).values())

    @property
    def pool_bytes(self) -> int:
        """KV blocks and state slots."""
        return sum(self.parts[name] for name in ("kv_cache", "running_states", "snapshots"))

    def require(self) -> MemoryPlan:
        """The plan itself, if it fits.

        Raises:
            ConfigError: it does not, with the nearest settings that do.
        """
        if self.fits:
            return self
        asked, short = self.request, self.request.required_bytes - self.request.memory_bytes
        raise ConfigError(
            f"{asked.full_seqs} x {asked.max_model_len:,} tokens need "
            f"{asked.required_bytes / GIB:.2f} GiB and {asked.memory_bytes / GIB:.2f} GiB are "
            f"there ({short:,} bytes short)",
            hint="this fits: " + "; or ".join(s.text for s in self.suggestions)
            if self.suggestions
            else "no setting makes this model fit; use a device with more memory",
        )


def plan_memory(
    config: ModelConfig,
    *,
    weights: WeightFormat | None = None,
    memory_bytes: int | None = None,
    device: str = "cuda",
    weights_loaded: bool = False,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    full_seqs: int = 1,
    max_num_batched_tokens: int | None = None,
    block_size: int = BLOCK_SIZE,
    kv_cache_dtype: str = "auto",
    state_dtype: str = "float32",
    num_speculative_tokens: int = 0,
    enable_prefix_caching: bool = True,
    snapshots: int | None = None,
    expected_tokens: int = EXPECTED_TOKENS,
    enforce_eager: bool = False,
    compiled_copies: bool = False,
) -> MemoryPlan:
    """Plan the memory of an engine.

    Args:
        config: the model.
        weights: how its weights are stored; default bfloat16.
        memory_bytes: what the process may use; with ``weights_loaded`` what is still free. None on
            a CPU: half of what is free beside the weights, and small pools (CPU_POOL_BYTES).
        device: "cuda" or "cpu".
        weights_loaded: weights and the context of the process are already there.
        max_model_len: most tokens of a sequence; None: the model's own length, or less if even one
            such sequence does not fit.
        max_num_seqs: sequences that run at once; None: 256 on a GPU and 64 on a CPU, halved until
            their states take at most a quarter of what is left after weights and workspaces.
        full_seqs: sequences of ``max_model_len`` that must fit at the same time.
        max_num_batched_tokens: most rows of a step; None decides by device.
        block_size: tokens of a KV block.
        kv_cache_dtype: "auto" is the dtype of the activations; or fp8 and others.
        state_dtype: of recurrent states, float32 or bfloat16.
        num_speculative_tokens: MTP drafts per step.
        enable_prefix_caching: use what is left to remember finished requests.
        snapshots: state slots beyond the running ones; None shares out what is left.
        expected_tokens: prompt and output of a typical request.
        enforce_eager: no CUDA graphs.
        compiled_copies: the CPU's compiled loops keep copies of the matrices.

    Returns:
        The plan; ``require()`` refuses one that does not fit.

    Raises:
        ConfigError: an option outside its range.
    """
    counts = {
        "max_model_len": max_model_len, "max_num_seqs": max_num_seqs, "full_seqs": full_seqs,
        "max_num_batched_tokens": max_num_batched_tokens, "memory_bytes": memory_bytes,
        "block_size": block_size, "expected_tokens": expected_tokens,
    }  # fmt: skip
    for name, count in counts.items():
        _check_count(name, count, 1)
    _check_count("snapshots", snapshots, 0)
    _check_count("num_speculative_tokens", num_speculative_tokens, 0)
    _check_choice("device", device, tuple(PREFILL_TOKENS))
    _check_choice("kv_cache_dtype", kv_cache_dtype, CACHE_DTYPES)
    _check_choice("state_dtype", state_dtype, STATE_DTYPES)
    if num_speculative_tokens and not config.num_mtp_layers:
        raise ConfigError(
            f"num_speculative_tokens={num_speculative_tokens} needs MTP weights, and this model "
            "has none",
            hint="leave num_speculative_tokens at 0",
        )
    form = weights or WeightFormat()
    held = sum(footprint.weight_bytes(config, form).values())
    held += footprint.compiled_copy_bytes(config) if compiled_copies else 0
    unnamed = memory_bytes is None
    if memory_bytes is None:
        if device != "cpu":
            raise ConfigError("how much memory is there?", hint="name a GPU or memory_bytes")
        free = free_ram()  # of what the weights leave, half stays free for everything else
        memory_bytes = free // 2 if weights_loaded else min(free, (free + held) // 2)
    if weights_loaded:
        memory_bytes += held
    asked = PlanRequest(
        config=config, weights=form, memory_bytes=memory_bytes,
        device="cuda" if device == "cuda" else "cpu",
        context_bytes=CONTEXT_BYTES if device == "cuda" and not weights_loaded else 0,
        max_model_len=max_model_len or longest_context(config),
        max_num_seqs=max_num_seqs or max(full_seqs, RUNNING_SEQUENCES[device]),
        full_seqs=full_seqs,
        max_num_batched_tokens=max_num_batched_tokens or PREFILL_TOKENS[device],
        block_size=block_size, kv_cache_dtype=kv_cache_dtype, state_dtype=state_dtype,
        num_speculative_tokens=num_speculative_tokens,
        enable_prefix_caching=enable_prefix_caching, snapshots=snapshots,
        expected_tokens=expected_tokens, enforce_eager=enforce_eager,
        compiled_copies=compiled_copies,
    )  # fmt: skip
    if full_seqs > asked.max_num_seqs:
        raise ConfigError(
            f"full_seqs={full_seqs} exceeds max_num_seqs={max_num_seqs}: only running sequences "
            "hold a context"
        )
    if max_num_seqs is None:
        asked = _fewer_sequences(asked)
    if max_model_len is None and not asked.fits:
        asked = _longest(asked) or asked
    return divide(asked, bounded=unnamed)


def divide(asked: PlanRequest, *, bounded: bool = False) -> MemoryPlan:
    """Share out what is left after everything required; ``bounded`` keeps the pools small."""
    blocks = asked.full_seqs * asked.blocks(asked.max_model_len)
    snapshots = asked.snapshots or 0
    left = asked.memory_bytes - asked.required_bytes
    if not asked.fits:
        return MemoryPlan(asked, blocks, snapshots, asked.required(), suggest(asked))
    if bounded:
        pools = blocks * asked.block_bytes + (asked.max_num_seqs + snapshots) * asked.slot_bytes
        left = max(0, min(left, CPU_POOL_BYTES - pools))
    block, slot = asked.block_bytes, asked.slot_bytes
    wanted = asked.max_num_seqs * asked.blocks(asked.max_model_len) - blocks
    if not asked.enable_prefix_caching:
        more = min(wanted, left // block) if block else 0
        blocks, left = blocks + more, 0
    elif asked.snapshots is None:
        # One remembered request: its KV blocks, and the states one can go on from.
        tokens = min(asked.expected_tokens, asked.max_model_len)
        stateful = footprint.delta_layers(asked.config) > 0
        states = SNAPSHOTS_PER_REQUEST if stateful else 0
        unit = asked.blocks(tokens) * block + states * slot
        snapshots = left // unit * states if unit else 0
        left -= snapshots * slot
    if asked.enable_prefix_caching and block:
        blocks += left // block
    parts = asked.required()
    parts["kv_cache"] = blocks * block
    parts["snapshots"] = snapshots * slot
    return MemoryPlan(asked, blocks, snapshots, parts)


def _fewer_sequences(asked: PlanRequest) -> PlanRequest:
    """Halve ``max_num_seqs`` until the running states leave three quarters to everything else."""
    while asked.max_num_seqs > asked.full_seqs:
        room = asked.memory_bytes - sum(asked.fixed.values())
        if asked.max_num_seqs * asked.slot_bytes * 4 <= room:
            break
        asked = replace(asked, max_num_seqs=max(asked.full_seqs, asked.max_num_seqs // 2))
    return asked


def _longest(asked: PlanRequest) -> PlanRequest | None:
    tokens = largest(asked.max_model_len, lambda n: replace(asked, max_model_len=n).fits)
    return replace(asked, max_model_len=tokens) if tokens else None


def _check_count(name: str, value: object, least: int) -> None:
    if value is not None and (type(value) is not int or value < least):
        raise ConfigError(f"{name}={value!r} must be a whole number, at least {least}")


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not known", hint="known: " + ", ".join(known))
