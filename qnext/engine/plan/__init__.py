"""The memory planner: a table of bytes from the config, and the pools an engine starts with."""

from __future__ import annotations

from qnext.engine.plan.devices import GPUS, free_memory, gpu_memory, parse_memory
from qnext.engine.plan.footprint import WeightFormat, weight_bytes
from qnext.engine.plan.measure import Comparison, compare, measure
from qnext.engine.plan.planner import MemoryPlan, plan_memory
from qnext.engine.plan.presets import PRESETS, preset
from qnext.engine.plan.request import PlanRequest, Suggestion

__all__ = [
    "GPUS",
    "PRESETS",
    "Comparison",
    "MemoryPlan",
    "PlanRequest",
    "Suggestion",
    "WeightFormat",
    "compare",
    "free_memory",
    "gpu_memory",
    "measure",
    "parse_memory",
    "plan_memory",
    "preset",
    "weight_bytes",
]
