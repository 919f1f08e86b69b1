"""What is asked of the planner, and the bytes that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from qnext.config import ModelConfig
from qnext.engine.plan import footprint
from qnext.engine.plan.devices import MIB
from qnext.engine.plan.footprint import WeightFormat


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What is asked for: a model, a memory, and limits with vLLM's names.

    Attributes:
        config: the model.
        weights: how its weights are stored.
        memory_bytes: all that the process may use, weights included.
        device: "cuda" or "cpu".
        context_bytes: taken before the first tensor.
        max_model_len: most tokens of a sequence.
        max_num_seqs: sequences that run at the same time: each has a state slot.
        full_seqs: so many of them are promised KV blocks for ``max_model_len`` tokens each.
        max_num_batched_tokens: most rows of a step.
        block_size: tokens of a KV block.
        kv_cache_dtype: of keys and values.
        state_dtype: of recurrent states.
        num_speculative_tokens: MTP drafts per step.
        enable_prefix_caching: what is left over remembers finished requests.
        snapshots: state slots beyond the running ones; None shares out what is left.
        expected_tokens: of a typical request.
        enforce_eager: no CUDA graphs.
        compiled_copies: a CPU holds its matrices a second time, laid out for compiled loops.
    """

    config: ModelConfig
    weights: WeightFormat
    memory_bytes: int
    device: Literal["cuda", "cpu"]
    context_bytes: int
    max_model_len: int
    max_num_seqs: int
    full_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_cache_dtype: str
    state_dtype: str
    num_speculative_tokens: int
    enable_prefix_caching: bool
    snapshots: int | None
    expected_tokens: int
    enforce_eager: bool
    compiled_copies: bool

    @property
    def dtype(self) -> str:
        """Of activations, convolution inputs and hidden states."""
        return self.weights.compute_dtype

    @property
    def kv_dtype(self) -> str:
        """``kv_cache_dtype`` with "auto" resolved."""
        return self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    def blocks(self, tokens: int) -> int:
        """KV blocks of one sequence of ``tokens`` tokens, with room for what is drafted beyond.

        One more row, because the MTP layer stores its rows one place further on.
        """
        if not self.kv_layers:
            return 0
        ahead = self.num_speculative_tokens + 1
        return -(-(tokens + ahead) // self.block_size)

    @property
    def kv_layers(self) -> int:
        """Layers with keys and values, the MTP layer included."""
        return footprint.attention_layers(self.config) + self.config.num_mtp_layers

    @property
    def block_bytes(self) -> int:
        """One KV block in all layers."""
        row = footprint.kv_row_bytes(self.config, self.kv_dtype)
        return self.kv_layers * self.block_size * row

    @property
    def slot_bytes(self) -> int:
        """One state slot in all layers."""
        return sum(footprint.slot_bytes(self.config, self.dtype, self.state_dtype).values())

    @property
    def verify_rows(self) -> int:
        """Rows of a step in which every running sequence verifies its drafts."""
        return self.max_num_seqs * (self.num_speculative_tokens + 1)

    def workspace(self) -> dict[str, int]:
        """Bytes that a step needs beside weights and pools, by part."""
        c, cuda = self.config, self.device == "cuda"
        widths = footprint.activation_row_bytes(c, self.dtype, kernels=cuda)
        row = widths["residual"] + max(widths["delta_net"], widths["attention"], widths["mlp"])
        found = {"activations": max(self.max_num_batched_tokens, self.verify_rows) * row}
        if footprint.attention_layers(c) and not cuda:
            # One sequence at a time: its keys and values gathered, and a mask (bool, then fp32).
            keys = self.max_model_len * footprint.kv_row_bytes(c, self.dtype)
            mask = min(self.max_num_batched_tokens, self.max_model_len) * self.max_model_len * 5
            found["attention_workspace"] = keys + mask
        if self.num_speculative_tokens:
            kept = footprint.verify_row_bytes(c, self.dtype)
            found["verify"] = self.verify_rows * kept
        found["logits"] = self.verify_rows * footprint.logits_row_bytes(c, self.dtype)
        if cuda and not self.enforce_eager:
            # Their pool holds the activations of the largest batch; a node takes about 1 KiB.
            nodes = 20 * (c.num_hidden_layers + c.num_mtp_layers)
            graphs = len(graph_batches(self.max_num_seqs)) * (1 + self.num_speculative_tokens)
            found["cuda_graphs"] = self.verify_rows * row + graphs * nodes * 1024
        return found

    @cached_property
    def fixed(self) -> dict[str, int]:
        """Bytes that do not depend on contexts: weights by part, workspaces, slack."""
        found = footprint.weight_bytes(self.config, self.weights)
        if self.compiled_copies:
            found["compiled_copies"] = footprint.compiled_copy_bytes(self.config)
        found |= self.workspace()
        found["context"] = self.context_bytes
        # What a caching allocator keeps between tensors of different sizes: on an H100 0.6 GB
        # beside 1.35 GB of a step's tensors. A CPU's allocator gives large tensors back.
        moving, cuda = sum(self.workspace().values()), self.device == "cuda"
        found["slack"] = moving // (2 if cuda else 8) + 64 * MIB
        return found

    def required(self) -> dict[str, int]:
        """Everything that must be there, in bytes by part."""
        found = dict(self.fixed)
        found["kv_cache"] = self.full_seqs * self.blocks(self.max_model_len) * self.block_bytes
        found["running_states"] = self.max_num_seqs * self.slot_bytes
        found["snapshots"] = (self.snapshots or 0) * self.slot_bytes
        return found

    @property
    def required_bytes(self) -> int:
        """The sum of ``required``."""
        pools = self.full_seqs * self.blocks(self.max_model_len) * self.block_bytes
        slots = self.max_num_seqs + (self.snapshots or 0)
        return sum(self.fixed.values()) + pools + slots * self.slot_bytes

    @property
    def fits(self) -> bool:
        """Whether what must be there is not more than what there is."""
        return self.required_bytes <= self.memory_bytes


@dataclass(frozen=True)
class Suggestion:
    """Changed settings with which the plan fits.

    Attributes:
        changes: fields of ``PlanRequest``.
        text: the same as options of the command line.
    """

    changes: Mapping[str, Any]
    text: str


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number in 0..most that fits, if all below one that fits fit too."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def graph_batches(max_num_seqs: int) -> list[int]:
    """Batch sizes that get a CUDA graph: powers of two, then every eighth step, up to the most."""
    sizes = {1, 2, 4, *range(8, max_num_seqs + 1, 8), max_num_seqs}
    return sorted(n for n in sizes if n <= max_num_seqs)
