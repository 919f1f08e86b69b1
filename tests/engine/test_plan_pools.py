"""Planned pools against the state that a model really makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plan_models import FAMILIES, config_of

from qnext.checkpoint import build_model, load_model
from qnext.checkpoint.load import empty_model
from qnext.engine.plan import WeightFormat, compare, measure, plan_memory, preset
from qnext.hub import shipped_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pools_are_those_of_the_built_model(family: str, dtype: str) -> None:
    config = config_of(**FAMILIES[family])
    model = build_model(config, getattr(torch, dtype))
    plan = plan_memory(
        config, weights=WeightFormat(dtype), memory_bytes=1 << 30, max_model_len=40,
        max_num_seqs=3, block_size=8, snapshots=2,
    )  # fmt: skip
    state = model.new_state(plan.num_slots, num_blocks=plan.num_blocks, block_size=8)
    assert plan.pool_bytes == state.nbytes
    assert measure(model, state) == {
        "weights": plan.weight_bytes,
        "kv_cache": plan.parts["kv_cache"],
        "states": plan.parts["running_states"] + plan.parts["snapshots"],
    }


@pytest.mark.parametrize(("kv", "wide"), [("fp8", torch.float8_e4m3fn), ("float32", torch.float32)])
def test_pools_in_other_dtypes(kv: str, wide: torch.dtype) -> None:
    config = config_of()
    model = build_model(config, torch.bfloat16)
    plan = plan_memory(
        config, memory_bytes=1 << 30, max_model_len=64, max_num_seqs=2, snapshots=1,
        kv_cache_dtype=kv, state_dtype="bfloat16",
    )  # fmt: skip
    sizes: dict[str, Any] = {"num_blocks": plan.num_blocks, "block_size": plan.block_size}
    state = model.new_state(plan.num_slots, **sizes, kv_dtype=wide, state_dtype=torch.bfloat16)
    assert plan.pool_bytes == state.nbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shipped_model_starts_as_planned(dtype: str) -> None:
    model = load_model(shipped_model(), dtype=dtype, device="cpu")
    plan = plan_memory(
        model.config, weights=WeightFormat(dtype), memory_bytes=260 << 20, device="cpu",
        max_model_len=512, max_num_seqs=4,
    ).require()  # fmt: skip
    state = model.new_state(plan.num_slots, num_blocks=plan.num_blocks, block_size=plan.block_size)
    report = compare(plan, measure(model, state))
    assert [row[1] for row in report.rows] == [row[2] for row in report.rows]
    assert report.excess == 0


def test_one_block_and_one_slot_of_the_80b() -> None:
    config = preset("80b")
    model = empty_model(config, torch.bfloat16, {}, torch.device("meta"))
    state = model.new_state(3, num_blocks=5, block_size=16)
    asked = plan_memory(config, memory_bytes=1 << 40, max_model_len=64).request
    assert 3 * asked.slot_bytes + 5 * asked.block_bytes == state.nbytes
