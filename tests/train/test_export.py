"""What a run exports: transformers reads it, and its logits are those of the trainer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy import MODEL, write_recipe

from qnext.layers.packed import PackedBatch
from qnext.train.config import load_recipe
from qnext.train.trainer import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    folder = tmp_path_factory.mktemp("export")
    recipe = write_recipe(folder, steps=12)
    trainer = Trainer(load_recipe(recipe, ["optimizer.lr=2e-2"]))
    trainer.run()
    # As the trainer has them, rounded as the export is.
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.copy_(p.bfloat16())
    return trainer, folder / "run" / "model"


def test_transformers_gives_the_trainer_s_logits(trained) -> None:  # type: ignore[no-untyped-def]
    import transformers

    trainer, folder = trained
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 32, 75))
    with torch.no_grad():
        hidden = trainer.model.hidden_states(ids, PackedBatch.of([75]))
        ours = trainer.model.logits(hidden)
        want = theirs(ids[None]).logits[0]
    assert want.std() > 0.1
    torch.testing.assert_close(ours, want, rtol=2e-5, atol=2e-5)


def test_mtp_is_in_the_folder_and_is_the_trainer_s(trained) -> None:  # type: ignore[no-untyped-def]
    trainer, folder = trained
    tensors = load_file(folder / "model.safetensors")
    mtp = {n: t for n, t in tensors.items() if n.startswith("mtp.")}
    experts = 3 * MODEL["num_experts"]
    assert len([n for n in mtp if ".experts." in n]) == experts
    fc = dict(trainer.model.named_parameters())["mtp.fc.weight"]
    assert torch.equal(mtp["mtp.fc.weight"].float(), fc.detach())
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1
