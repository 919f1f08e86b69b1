"""Run by torchrun: every layout's loss and gradients against one process, in fp64."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "train")]
warnings.simplefilter("ignore")

from tiny import randomise  # noqa: E402
from toy import MODEL  # noqa: E402

from qnext.checkpoint import build_model  # noqa: E402
from qnext.config import ModelConfig  # noqa: E402
from qnext.parallel import Mesh, ParallelConfig, Ranks, parallelise  # noqa: E402
from qnext.train.config import LossConfig  # noqa: E402
from qnext.train.data import TrainBatch, make_batch  # noqa: E402
from qnext.train.loss import Objective, Step  # noqa: E402

CONFIG = ModelConfig.from_dict(
    {
        **MODEL, "num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 4,
        "linear_num_value_heads": 8, "num_experts": 8, "num_hidden_layers": 3,
        "full_attention_interval": 3, "tie_word_embeddings": False,
    }
)  # fmt: skip
LOSS = LossConfig(mtp_weight=0.3, mtp_depth=2, load_balance=0.05, router_z=0.01)
# Packs of a step, by lengths of their sequences: odd, of one token, shorter than the convolution,
# longer than a chunk of the delta rule and than a rank's piece.
PACKS = [[7, 1, 70, 3], [2, 79], [81], [1, 1, 1, 75, 3]]


def packs(count: int) -> list[TrainBatch]:
    rng = np.random.default_rng(1)
    made = [[rng.integers(0, 32, n) for n in lengths] for lengths in PACKS]
    return [make_batch(pack, 2) for pack in made[:count]]


def fresh() -> Objective:
    model = build_model(CONFIG, torch.float64)
    randomise(model, 5)
    return Objective(model.train(), LOSS)


def single(batches: list[TrainBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    """All packs as one batch in one process."""
    flat = [piece.numpy() for b in batches for piece in b.input_ids.split(b.packed.lengths)]
    whole = make_batch(flat, 2)
    objective = fresh()
    total, *_ = objective(whole, Step(whole.valid, len(whole.input_ids)))
    total.backward()
    return total.item(), {n: p.grad for n, p in objective.model.named_parameters()}


def spread(
    config: ParallelConfig, recompute: bool
) -> tuple[float, dict[str, torch.Tensor], list[TrainBatch]]:
    mesh = Mesh.of(config, torch.device("cpu"))
    part, parts = mesh.place("data")
    index, count = mesh.place("context")
    batches = packs(parts)
    step = Step(
        tuple(map(sum, zip(*(b.valid for b in batches), strict=True))),
        sum(len(b.input_ids) for b in batches),
    )
    batch = batches[part]
    batch = batch.cut(index, count)
    objective = fresh()
    objective.ranks = Ranks(mesh)
    kinds = ("layer", "experts") if recompute else ()
    parallelise(objective, objective.model, mesh, config, torch.float64, kinds)
    total, *_ = objective(batch, step)
    total.backward()
    dist.all_reduce(total := total.detach())
    grads = {}
    for name, param in objective.model.named_parameters():
        assert isinstance(param.grad, DTensor), name
        grads[name] = param.grad.full_tensor()
    return total.item(), grads, batches


def check_first_weights(folder: Path) -> None:
    """Drawn or read in parts, the weights are those of one process; put together they are whole."""
    from qnext.checkpoint import load_model, save_model
    from qnext.parallel.data import whole
    from qnext.train.build import build_objective, gathered
    from qnext.train.config import TrainConfig

    if dist.get_rank() == 0:
        save_model(fresh().model.bfloat16(), folder)
    dist.barrier()
    words = {"output": "", "data": {"shards": "x", "tokenizer": "x", "batch_tokens": 1},
             "optimizer": {"lr": 1}, "steps": 1, "seed": 9}  # fmt: skip
    parallel = {"expert_parallel_size": 2, "tensor_parallel_size": 2}
    drawn = build_model(CONFIG, seed=9)
    given = load_model(folder, dtype="float32", device="cpu")
    for start, model in (({"model": {"a": 1}}, drawn), ({"init_from": str(folder)}, given)):
        config = TrainConfig(**words, **start, parallel=parallel)
        mesh = Mesh.of(config.parallel, torch.device("cpu"))
        made = build_objective(config, CONFIG, mesh, torch.device("cpu"), torch.float32)
        for name, param in made.model.named_parameters():
            assert torch.equal(whole(param), dict(model.named_parameters())[name]), name
        copy = gathered(made.model, dist.get_rank() == 0)
        assert (copy is not None) == (dist.get_rank() == 0)
        if copy is not None:
            for name, param in copy.named_parameters():
                assert torch.equal(param, dict(model.named_parameters())[name].bfloat16()), name


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    check_first_weights(Path(os.environ["OUT"]).with_suffix(".model"))
    results, known = {}, {}
    for spec in sys.argv[1:]:
        sizes = dict(part.split("=") for part in spec.split(",") if part)
        recompute = bool(sizes.pop("recompute", ""))
        config = ParallelConfig(**{f"{k}_parallel_size": int(v) for k, v in sizes.items()})
        loss, grads, batches = spread(config, recompute)
        if len(batches) not in known:
            known[len(batches)] = single(batches)
        want, reference = known[len(batches)]
        odd = {
            n: (g.shape, reference[n].shape)
            for n, g in grads.items()
            if g.shape != reference[n].shape
        }
        assert not odd, odd
        worst = max(
            float((grads[n] - g).norm() / g.norm().clamp(min=1e-6)) for n, g in reference.items()
        )
        results[spec] = [abs(loss - want) / abs(want), worst]
    if dist.get_rank() == 0:
        Path(os.environ["OUT"]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
