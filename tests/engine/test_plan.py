"""The memory planner: exact bytes, honest limits, suggestions that hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from plan_models import FAMILIES, config_of
from tiny import randomise

from qnext.checkpoint import build_model, load_model
from qnext.checkpoint.load import empty_model
from qnext.config import ModelConfig
from qnext.engine.plan import (
    GPUS,
    PRESETS,
    MemoryPlan,
    WeightFormat,
    compare,
    gpu_memory,
    measure,
    parse_memory,
    plan_memory,
    preset,
    weight_bytes,
)
from qnext.engine.plan.devices import free_ram
from qnext.engine.plan.footprint import activation_row_bytes, compiled_copy_bytes
from qnext.errors import ConfigError
from qnext.hub import shipped_model
from qnext.layers.fused import fuse
from qnext.layers.packed import PackedBatch

BIG = 1 << 50


def plan_80b(memory: int = GPUS["h200"], **options: Any) -> MemoryPlan:
    return plan_memory(preset("80b"), memory_bytes=memory, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_built_model(family: str, dtype: str) -> None:
    config = config_of(**FAMILIES[family])
    model = build_model(config, getattr(torch, dtype))
    found = weight_bytes(config, WeightFormat(dtype))
    assert sum(found.values()) == sum(p.nbytes for p in model.parameters())
    assert measure(model)["weights"] == sum(found.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shipped_model_takes_what_is_planned(dtype: str) -> None:
    model = load_model(shipped_model(), dtype=dtype, device="cpu")
    found = weight_bytes(model.config, WeightFormat(dtype))
    assert sum(found.values()) == sum(p.nbytes for p in model.parameters())


def test_copies_of_the_compiled_loops() -> None:
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("numba")
    model = load_model(shipped_model(), dtype="float32", device="cpu")
    assert fuse(model)
    assert model.fused is not None
    assert model.fused.wide
    found: dict[int, int] = {}

    def walk(thing: Any) -> None:
        if isinstance(thing, numpy.ndarray):
            found[thing.__array_interface__["data"][0]] = thing.nbytes
        elif isinstance(thing, tuple | list):
            for one in thing:
                walk(one)
        elif type(thing).__module__.startswith("qnext."):
            for one in vars(thing).values():
                walk(one)

    for one in vars(model.fused).values():
        if one is not model.rotary:
            walk(one)
    assert sum(found.values()) == pytest.approx(compiled_copy_bytes(model.config), rel=0.02)


def test_the_80b_on_the_meta_device() -> None:
    config = preset("80b")
    model = empty_model(config, torch.bfloat16, {}, torch.device("meta"))
    found = weight_bytes(config, WeightFormat())
    assert sum(found.values()) == sum(p.nbytes for p in model.parameters())
    assert sum(found.values()) == 2 * 81_324_862_720
    named = dict(model.named_parameters())
    for part, text in (("experts", ".mlp.experts."), ("mtp", "mtp."), ("router", ".mlp.gate.")):
        exact = [p.nbytes for n, p in named.items()
                 if text in n and n.startswith("mtp.") == (part == "mtp")]  # fmt: skip
        assert found[part] == sum(exact), part


def test_published_sizes_of_the_80b() -> None:
    """The official FP8 repository: 75,535 scale tensors of known shapes, 76.4 GiB in all."""
    found = weight_bytes(preset("80b"), WeightFormat("fp8"))
    layers = 36 * (96 * 16 + 16 * 32) + 13 * (64 * 16 + 2 * 4 * 16 + 16 * 32)
    experts = 49 * 513 * 3 * 4 * 16
    assert found["scales"] == 4 * (layers + experts)
    assert sum(found.values()) / 2**30 == pytest.approx(76.4, abs=0.05)
    slot = plan_80b(weights=WeightFormat("fp8")).request
    assert slot.slot_bytes == 36 * 2**21 + 36 * 8192 * 3 * 2 + 4096
    assert slot.block_bytes == 16 * (24_576 + 2048)  # the MTP layer is a thirteenth


@pytest.mark.parametrize(
    ("form", "total"),
    [(WeightFormat(), 162.7), (WeightFormat("fp8"), 82.0), (WeightFormat("int4"), 46.7),
     (WeightFormat("int4", group_size=128), 42.9), (WeightFormat("fp8", "int4"), 47.5)],
)  # fmt: skip
def test_weights_of_the_roofline_notes(form: WeightFormat, total: float) -> None:
    assert sum(weight_bytes(preset("80b"), form).values()) / 1e9 == pytest.approx(total, abs=0.06)


def test_int4_counts_words_scales_and_zero_points() -> None:
    form = WeightFormat("int4", group_size=32, zero_points=True)
    assert form.matrix((3, 20, 70), stored="int4") == (
        3 * 20 * 9 * 4,
        3 * 20 * 3 * 2,
        3 * 3 * 4 * 3,
    )
    assert WeightFormat("fp8").matrix((2, 130, 128), stored="fp8") == (2 * 130 * 128, 2 * 2 * 4, 0)


def test_other_presets() -> None:
    dense = sum(weight_bytes(preset("qwen3-32b"), WeightFormat()).values())
    assert dense == 2 * 32_762_123_264
    assert sum(weight_bytes(preset("235b"), WeightFormat()).values()) == 2 * 235_093_634_560
    assert set(PRESETS) == {"80b", "qwen3-32b", "235b"}
    with pytest.raises(ConfigError, match="no model is known"):
        preset("80c")


def test_a_bigger_context_on_one_card() -> None:
    """Section 1.4 of the notes, with a real card and real workspaces: docs/planning.md."""
    fp8 = WeightFormat("fp8")
    longest = plan_80b(weights=fp8, max_model_len=4_000_000, max_num_seqs=1)
    assert longest.suggestions[0].changes["max_model_len"] == pytest.approx(2.44e6, rel=0.02)
    small = plan_80b(GPUS["h100"], weights=fp8, max_model_len=4096, max_num_seqs=1)
    assert not small.fits
    assert any("int4" in s.text for s in small.suggestions)


sizes = st.fixed_dictionaries(
    {
        "max_model_len": st.integers(1, 3000),
        "max_num_seqs": st.integers(1, 9),
        "max_num_batched_tokens": st.integers(1, 600),
        "block_size": st.sampled_from([1, 7, 16]),
        "kv_cache_dtype": st.sampled_from(["auto", "fp8", "float32"]),
        "state_dtype": st.sampled_from(["float32", "bfloat16"]),
        "num_speculative_tokens": st.integers(0, 3),
        "snapshots": st.none() | st.integers(0, 5),
        "enable_prefix_caching": st.booleans(),
        "device": st.sampled_from(["cuda", "cpu"]),
        "enforce_eager": st.booleans(),
        "expected_tokens": st.integers(1, 5000),
    }
)
TINY = config_of()


def required(options: dict[str, Any]) -> int:
    return plan_memory(TINY, memory_bytes=BIG, **options).request.required_bytes


@given(sizes, st.integers(-3, 1 << 22))
def test_it_fits_exactly_if_there_is_room(options: dict[str, Any], spare: int) -> None:
    options["full_seqs"] = options["max_num_seqs"]
    memory = required(options) + spare
    plan = plan_memory(TINY, memory_bytes=memory, **options)
    asked = plan.request
    assert plan.fits == (spare >= 0) == (asked.required_bytes <= memory)
    assert sum(asked.required().values()) == asked.required_bytes
    assert plan.parts["kv_cache"] == plan.num_blocks * asked.block_bytes
    assert plan.pool_bytes == plan.parts["kv_cache"] + plan.num_slots * asked.slot_bytes
    assert plan.num_blocks >= asked.full_seqs * asked.blocks(asked.max_model_len)
    if plan.fits:
        assert plan.total_bytes <= memory
        assert plan.suggestions == ()
        assert plan.require() is plan
    else:
        with pytest.raises(ConfigError, match=f"{-spare:,} bytes short"):
            plan.require()


@settings(max_examples=60)
@given(sizes, st.integers(1, 9), st.floats(0.05, 0.999))
def test_suggestions_do_fit(options: dict[str, Any], full: int, share: float) -> None:
    options["full_seqs"] = min(full, options["max_num_seqs"])
    memory = int(required(options) * share)
    plan = plan_memory(TINY, memory_bytes=max(1, memory), **options)
    assume(not plan.fits)
    for suggestion in plan.suggestions:
        changed = replace(plan.request, **suggestion.changes)
        assert changed.fits, suggestion.text
        assert changed != plan.request
        assert suggestion.text
        if set(suggestion.changes) == {"max_model_len"}:  # the largest, to the token
            longer = changed.max_model_len + 1
            assert not replace(changed, max_model_len=longer).fits
        if set(suggestion.changes) == {"full_seqs", "max_num_seqs"}:
            more = changed.full_seqs + 1
            assert not replace(changed, full_seqs=more, max_num_seqs=more).fits


@given(sizes, st.sampled_from(["max_model_len", "max_num_seqs", "max_num_batched_tokens",
                               "num_speculative_tokens", "snapshots"]))  # fmt: skip
def test_more_never_takes_less(options: dict[str, Any], name: str) -> None:
    more = {**options, name: (options[name] or 0) + 1}
    if name == "num_speculative_tokens" or options["snapshots"] is None:
        more["snapshots"] = options["snapshots"] = 1
    assert required(more) >= required(options)


@given(sizes, st.integers(0, 1 << 24), st.integers(1, 1 << 20))
def test_more_memory_gives_no_smaller_pools(options: dict[str, Any], spare: int, more: int) -> None:
    base = required(options) + spare
    small = plan_memory(TINY, memory_bytes=base, **options)
    large = plan_memory(TINY, memory_bytes=base + more, **options)
    assert large.pool_bytes + large.request.slot_bytes * 2 + large.request.block_bytes >= (
        small.pool_bytes
    )
    if options["enable_prefix_caching"]:  # nothing is left lying about but less than a block
        left = large.request.memory_bytes - large.total_bytes
        assert left < large.request.block_bytes


def test_the_split_follows_the_bytes_of_a_block_and_a_slot() -> None:
    """What is left remembers whole requests: blocks for their tokens, and two states of each."""
    plan = plan_80b(weights=WeightFormat("fp8"), max_model_len=262_144, max_num_seqs=8)
    asked = plan.request
    extra = plan.num_blocks - asked.blocks(asked.max_model_len)
    kept = plan.num_snapshots // 2
    assert kept * asked.blocks(4096) <= extra < (kept + 2) * asked.blocks(4096)
    longer = plan_80b(weights=WeightFormat("fp8"), max_model_len=262_144, max_num_seqs=8,
                      expected_tokens=65_536)  # fmt: skip
    assert longer.num_snapshots < plan.num_snapshots
    dense = plan_memory(preset("qwen3-32b"), memory_bytes=GPUS["h200"], max_num_seqs=8)
    assert dense.num_snapshots == 0


def test_without_a_prefix_cache_no_more_than_everybody_needs() -> None:
    plan = plan_memory(TINY, memory_bytes=1 << 34, max_model_len=64, max_num_seqs=3,
                       enable_prefix_caching=False)  # fmt: skip
    assert (plan.num_blocks, plan.num_snapshots) == (3 * plan.request.blocks(64), 0)


def test_a_length_nobody_named_shrinks_until_it_fits() -> None:
    tight = plan_memory(preset("80b"), weights=WeightFormat("fp8", "int4"),
                        memory_bytes=52 * 10**9, max_num_seqs=1)  # fmt: skip
    assert tight.fits
    assert 16 <= tight.max_model_len < 262_144
    assert not replace(tight.request, max_model_len=tight.max_model_len + 1).fits
    whole = plan_80b(weights=WeightFormat("fp8"))
    assert whole.max_model_len == 262_144
    assert whole.max_num_seqs == 128  # 256 states would take more than a quarter of the rest
    with pytest.raises(ConfigError) as caught:
        plan_80b(20 * 2**30).require()
    assert "int4" not in str(caught.value.hint)  # not even that: 43 GB
    assert "more memory" in str(caught.value.hint)


def test_defaults_on_this_machine_are_small() -> None:
    config = ModelConfig.from_pretrained(shipped_model())
    plan = plan_memory(config, device="cpu", weights=WeightFormat("float32"), weights_loaded=True)
    assert plan.fits
    assert plan.pool_bytes <= 1 << 30
    assert plan.max_model_len == 8192
    assert plan.num_snapshots >= 32


def test_weights_that_are_there_already() -> None:
    options: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 2}
    cold = plan_memory(TINY, memory_bytes=BIG, **options).request
    held = sum(weight_bytes(TINY, WeightFormat()).values())
    free = cold.required_bytes - held - cold.context_bytes
    assert plan_memory(TINY, memory_bytes=free, weights_loaded=True, **options).fits
    assert not plan_memory(TINY, memory_bytes=free - 1, weights_loaded=True, **options).fits


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_model_len": 0}, "max_model_len=0"),
        ({"max_num_seqs": True}, "max_num_seqs=True"),
        ({"block_size": 1.5}, r"block_size=1\.5"),
        ({"snapshots": -1}, "snapshots=-1"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype='int8'"),
        ({"state_dtype": "fp8"}, "state_dtype='fp8'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"full_seqs": 3, "max_num_seqs": 2}, "full_seqs=3 exceeds"),
        ({"memory_bytes": None}, "how much memory"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        plan_memory(TINY, **{"memory_bytes": 1 << 30, **options})


def test_drafts_without_mtp_weights() -> None:
    with pytest.raises(ConfigError, match="MTP weights"):
        plan_memory(config_of(num_nextn_predict_layers=0), memory_bytes=1, num_speculative_tokens=1)


@pytest.mark.parametrize("value", ["int3", "bf16", ""])
def test_unknown_formats(value: str) -> None:
    with pytest.raises(ConfigError, match="no format of weights"):
        WeightFormat(value)
    with pytest.raises(ConfigError, match="group_size"):
        WeightFormat("int4", group_size=0)


def test_sizes_in_words() -> None:
    assert parse_memory("48GiB") == 48 * 2**30
    assert parse_memory(" 80 gb ") == 80 * 10**9
    assert parse_memory("1.5MiB") == 1_572_864
    assert parse_memory("12") == 12
    for wrong in ("", "GiB", "-1GB", "4 parsecs", "0GB", "nanGB", "1e3GB"):
        with pytest.raises(ConfigError, match="memory"):
            parse_memory(wrong)
    assert gpu_memory("RTX 4090") == GPUS["rtx4090"]
    with pytest.raises(ConfigError, match="not known") as caught:
        gpu_memory("h300")
    assert "h200" in str(caught.value.hint) or "h100" in str(caught.value.hint)


def test_free_ram_minds_containers(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   8000 kB\n")
    assert free_ram(tmp_path) == 8000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("700000\n")
    assert free_ram(tmp_path) == 8000 * 1024
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 200000\n")
    assert free_ram(tmp_path) == 500_000
    assert free_ram() > 0


def test_compare_says_where_it_went_wrong() -> None:
    plan = plan_memory(TINY, memory_bytes=1 << 30, max_model_len=64, max_num_seqs=2)
    report = compare(plan, {"weights": plan.weight_bytes, "workspace": 3 << 30})
    planned = sum(plan.parts.get(k, 0) for k in ("activations", "logits", "cuda_graphs"))
    assert report.rows[1] == ("workspace", planned, 3 << 30)
    assert report.excess == (3 << 30) - planned
    assert "workspace" in str(report)
    assert "+0.0%" in str(report)
    with pytest.raises(ConfigError, match="'kv'"):
        compare(plan, {"kv": 1})


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5", "qwen3_moe"])
def test_activations_stay_within_the_plan(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The live tensors of a step, counted, against the formula; neither too small nor idle."""
    monkeypatch.setattr("qnext.kernels.select.usable", lambda package: False)
    wider = {"hidden_size": 64, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    config = config_of(**FAMILIES[family], **wider)
    model = build_model(config, torch.float32).eval()
    randomise(model)
    rows = 512
    ids = torch.randint(model.config.vocab_size, (rows,))
    with torch.inference_mode(), LiveBytes() as live:
        model.hidden_states(ids, PackedBatch.of([rows]))
    widths = activation_row_bytes(model.config, "float32", kernels=False)
    row = widths["residual"] + max(v for k, v in widths.items() if k != "residual")
    assert 0.3 * row * rows < live.peak <= 1.1 * row * rows, (live.peak / rows, widths)
