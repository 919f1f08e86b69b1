"""The training plan: as the code cuts, on the real 80B over 128 ranks that do not exist."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qnext.config import ModelConfig
from qnext.errors import ConfigError
from qnext.parallel.mesh import ParallelConfig
from qnext.train.plan import plan_training, table

ROOT = Path(__file__).resolve().parents[2]
# One rank of many, with torch's own process group that sends nothing.
_CUT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from qnext.checkpoint import build_model
from qnext.config import ModelConfig
from qnext.parallel import Mesh, ParallelConfig, Ranks, parallelise
from qnext.train.loss import Objective

config, layouts, ranks = json.loads(sys.argv[1])
dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
counts = []
for sizes in layouts:
    parallel = ParallelConfig(**{f"{k}_parallel_size": v for k, v in sizes.items()})
    mesh = Mesh.of(parallel, torch.device("cpu"))
    model = build_model(ModelConfig.from_dict(config), "float32", "meta")
    parallelise(Objective(model, ranks=Ranks(mesh)), model, mesh, parallel, torch.bfloat16)
    counts.append(sum(p.to_local().numel() for p in model.parameters()))
print(json.dumps(counts))
"""


def _real() -> ModelConfig:
    from qnext.engine.plan import preset

    return preset("80b").model_copy(update={"num_mtp_layers": 1})


def _plan(ranks: int = 128, **sizes: int):  # type: ignore[no-untyped-def]
    parallel = ParallelConfig(**{f"{k}_parallel_size": v for k, v in sizes.items()})
    return plan_training(
        _real(), parallel, ranks=ranks, seq_len=4096, batch_tokens=4_194_304, micro_batches=1024
    )


def test_the_real_model_is_cut_as_planned() -> None:
    layouts: list[dict[str, int]] = [{}, {"expert": 8}, {"expert": 128}]
    layouts += [{"expert": 32, "tensor": 2, "context": 2}]
    config = {**_real().to_hf_dict(), "num_nextn_predict_layers": 1}
    command = [sys.executable, "-c", _CUT, json.dumps([config, layouts, 128])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    held = [_plan(**sizes).memory["masters (FP32)"] for sizes in layouts]
    assert held == [4 * count for count in json.loads(done.stdout)]
    # Cutting loses next to nothing to rows that do not divide.
    assert held == pytest.approx([4 * 81_324_862_720 / 128] * 4, rel=0.005)


def test_expert_parallelism_spares_gathering_the_experts() -> None:
    alone, eight, all_ = _plan(), _plan(expert=8), _plan(expert=128)
    gathered = "gathered weights (BF16)"
    assert alone.memory[gathered] > 3 * eight.memory[gathered] > 3 * all_.memory[gathered]
    assert alone.sent["weights, all ranks"] > 20 * eight.sent["weights, all ranks"]
    assert "tokens to experts and back" not in alone.sent
    assert "weights, experts" not in all_.sent
    assert all_.total < eight.total < alone.total < 80e9


def test_layer_inputs_are_what_recomputing_keeps() -> None:
    """Counted on a small model: the saved tensors that have a token each."""
    import numpy as np
    from toy import MODEL

    from qnext.checkpoint import build_model
    from qnext.parallel.recompute import apply_recompute
    from qnext.train.config import LossConfig
    from qnext.train.data import make_batch
    from qnext.train.loss import Objective, Step

    config = ModelConfig.from_dict({**MODEL, "num_hidden_layers": 4})
    model = build_model(config)
    apply_recompute(model, ("layer",))
    batch = make_batch([np.arange(50) % 32], 1)
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.shape[:1] == (50,) and x.shape[-1] in (16, 32) and x.is_floating_point():
            kept[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        Objective(model.train(), LossConfig())(batch, Step(batch.valid, 50))
    plan = plan_training(
        config, ParallelConfig(), ranks=1, seq_len=64, batch_tokens=50, micro_batches=1
    )
    planned = plan.memory["layer inputs"] * 2  # this model computes in FP32
    assert sum(x.nbytes for x in kept.values()) == planned


def test_layouts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not divide over context 3"):
        _plan(context=3)
    with pytest.raises(ConfigError, match=r"128 ranks.* do not divide"):
        _plan(expert=3)


def test_the_table_has_a_column_per_layout() -> None:
    text = table({"FSDP": _plan(), "EP 8": _plan(expert=8)})
    rows = text.splitlines()
    assert rows[0] == "| GiB per rank | FSDP | EP 8 |"
    assert {row.count("|") for row in rows} == {4}
    assert any(row.startswith("| masters (FP32) | 2.3") for row in rows)


def test_time_is_flops_and_bytes_over_rates() -> None:
    plan = _plan(expert=8)
    computing, sending = plan.seconds(989e12, 0.4, 8, 450e9, 50e9)
    assert computing == pytest.approx(plan.flops / (128 * 989e12 * 0.4))
    slow = plan.seconds(989e12, 0.4, 8, 450e9, 25e9)[1]
    far = sum(size for part, size in plan.sent.items() if plan.group[part] > 8)
    assert slow - sending == pytest.approx(far / 25e9 - far / 50e9)
