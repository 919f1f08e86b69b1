"""Planned bytes beside used ones, for the log of a real start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qnext.engine.plan.planner import MemoryPlan
from qnext.errors import ConfigError
from qnext.layers.state import KVCache, ModelState

if TYPE_CHECKING:
    from qnext.layers.model import CausalLM

_WORKSPACE = ("activations", "attention_workspace", "verify", "logits", "cuda_graphs")


@dataclass(frozen=True)
class Comparison:
    """What was planned and what is used.

    Attributes:
        rows: (name, planned bytes, used bytes), the total last.
    """

    rows: tuple[tuple[str, int, int], ...]

    @property
    def excess(self) -> int:
        """Bytes used beyond the plan, summed over the parts that exceed it."""
        return sum(max(0, used - planned) for _, planned, used in self.rows[:-1])

    def __str__(self) -> str:
        lines = [f"{'memory':12} {'planned':>10} {'used':>10} {'':>7}  (MiB)"]
        for name, planned, used in self.rows:
            share = f"{used / planned - 1:+.1%}" if planned else ""
            lines.append(f"{name:12} {planned / 2**20:10,.1f} {used / 2**20:10,.1f} {share:>7}")
        return "\n".join(lines)


def measure(
    model: CausalLM, state: ModelState | None = None, peak_bytes: int | None = None
) -> dict[str, int]:
    """Bytes in use, by the names that ``compare`` knows.

    Args:
        model: its parameters are counted.
        state: its pools are counted.
        peak_bytes: the most that the allocator held during steps (``max_memory_allocated``); what
            is neither weights nor pools counts as workspace.
    """
    found = {"weights": sum(p.nbytes for p in model.parameters())}
    if state is not None:
        caches = [part for part in (*state.layers, state.mtp) if isinstance(part, KVCache)]
        found["kv_cache"] = sum(cache.k.nbytes + cache.v.nbytes for cache in caches)
        found["states"] = state.nbytes - found["kv_cache"]
    if peak_bytes is not None:
        found["workspace"] = peak_bytes - sum(found.values())
    return found


def compare(plan: MemoryPlan, measured: Mapping[str, int]) -> Comparison:
    """Put measured bytes beside the plan's.

    Args:
        plan: what the engine started from.
        measured: some of weights, kv_cache, states, workspace; ``measure`` gives them.

    Raises:
        ConfigError: a name that is not one of these.
    """
    parts = plan.parts
    planned = {
        "weights": plan.weight_bytes,
        "kv_cache": parts["kv_cache"],
        "states": parts["running_states"] + parts["snapshots"],
        "workspace": sum(parts.get(name, 0) for name in _WORKSPACE),
    }
    for name in measured:
        if name not in planned:
            raise ConfigError(f"no part of the plan is called {name!r}",
                              hint="known: " + ", ".join(planned))  # fmt: skip
    rows = [(name, planned[name], measured[name]) for name in planned if name in measured]
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    return Comparison(tuple(rows))
