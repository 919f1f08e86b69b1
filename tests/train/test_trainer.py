"""Whole runs of a tiny model: it learns, it stops in time, it says what is wrong."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import VOCAB, toy_documents, write_recipe, write_shards

from qnext import load_model
from qnext.errors import ConfigError, TrainingError
from qnext.layers.packed import PackedBatch
from qnext.train import main
from qnext.train.config import LossConfig, load_recipe
from qnext.train.data import TokenShards
from qnext.train.evaluate import evaluate
from qnext.train.loss import Objective
from qnext.train.trainer import Trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to the end."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder, steps=60, log_every=10)
    shown = ["report.tensorboard=true", "report.plots=true"]
    result = main(recipe, ["eval_every=30", *shown])
    assert result.finished
    assert (result.steps, result.skipped) == (60, 0)
    return folder


def test_the_loss_falls(finished: Path) -> None:
    rows = [json.loads(r) for r in (finished / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "loss" in r]
    assert [r["step"] for r in steps] == [10, 20, 30, 40, 50, 60]
    assert steps[0]["loss"] < math.log(VOCAB) + 0.2
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    assert steps[-1]["mtp_loss"] < 0.7 * steps[0]["mtp_loss"]
    assert all(0.9 < r["balance"] < 2 for r in steps)
    assert len(steps[-1]["expert_load"]) == 4  # two layers, MTP at two depths
    held = [r["heldout"]["bits_per_byte"] for r in rows if "heldout" in r]
    assert len(held) == 2
    assert held[1] < held[0]


def test_the_export_is_the_trained_model(finished: Path) -> None:
    report = json.loads((finished / "run" / "evaluation.json").read_text())
    model = load_model(finished / "run" / "model", dtype="float32", device="cpu")
    shards = TokenShards(finished / "shards", "heldout")
    again = evaluate(Objective(model, LossConfig()), [shards], seq_len=32, tokens=64)
    assert again.loss == pytest.approx(report["loss"], rel=0.02)  # the export is BF16
    assert again.tokens == report["tokens"]
    assert (finished / "run" / "model" / "tokenizer.json").exists()
    resolved = load_recipe(finished / "run" / "run.toml", [])
    assert resolved.steps == 60
    assert resolved.eval_every == 30


def test_figures_on_held_out_text_are_their_definitions(finished: Path) -> None:
    model = load_model(finished / "run" / "model", dtype="float32", device="cpu")
    shards = TokenShards(finished / "shards", "heldout")
    nats, hits, agree, right, chance, count, places = 0.0, 0, 0, 0, 0.0, 0, 0
    for n in range(len(shards)):
        ids = torch.from_numpy(shards.document(n).astype(np.int64))
        for piece in ids.split(32):
            batch = PackedBatch.of([len(piece)])
            with torch.no_grad():
                hidden = model.hidden_states(piece, batch)
                scores = model.logits(hidden).log_softmax(-1)
                following = torch.cat([piece[1:], piece[:1]])
                drafts = model.logits(model.draft_states(hidden, following, batch)).argmax(-1)
            for i in range(len(piece) - 1):
                nats -= scores[i, piece[i + 1]].item()
                hits += int(scores[i].argmax() == piece[i + 1])
                count += 1
                if i:
                    agree += int(drafts[i - 1] == scores[i].argmax())
                    right += int(drafts[i - 1] == piece[i + 1])
                    chance += scores[i, drafts[i - 1]].exp().item()
                    places += 1
    got = evaluate(Objective(model, LossConfig()), [shards], seq_len=32, tokens=100)
    assert got.tokens == count
    assert got.loss == pytest.approx(nats / count, rel=1e-5)
    share = count / len(shards.tokens)
    assert got.bits_per_byte == pytest.approx(nats / math.log(2) / (shards.num_bytes * share))
    assert got.accuracy == pytest.approx(hits / count)
    assert got.draft_agreement == pytest.approx(agree / places)
    assert got.draft_accuracy == pytest.approx(right / places)
    assert got.draft_acceptance == pytest.approx(chance / places, rel=1e-5)
    assert got.draft_agreement > 0.5


def test_bfloat16_learns_too(tmp_path: Path) -> None:
    result = main(write_recipe(tmp_path), ["dtype=bfloat16", "steps=15", "optimizer.lr=2e-2"])
    assert result.evaluation.loss < math.log(VOCAB) - 0.3


def test_a_dense_model_without_mtp_trains(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    head, _, rest = recipe.read_text().partition("[model]")
    data = rest[rest.index("[data]") :]
    model = """
    model_type = "qwen3"
    vocab_size = 32
    hidden_size = 16
    num_hidden_layers = 2
    num_attention_heads = 2
    num_key_value_heads = 1
    head_dim = 8
    rope_theta = 10000.0
    max_position_embeddings = 128
    intermediate_size = 24
    tie_word_embeddings = true
    """
    recipe.write_text(head + "[model]\n" + model + data)
    result = main(recipe, ["optimizer.lr=2e-2"])
    assert result.evaluation.loss < math.log(VOCAB)
    assert result.evaluation.draft_agreement is None


def test_the_clock_ends_a_run_with_its_decay(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, steps=100_000, log_every=1)
    result = main(recipe, ["time_limit_s=1.5", "optimizer.decay_fraction=0.5"])
    assert result.finished
    assert 2 <= result.steps < 10_000
    rows = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [r["lr"] for r in rows if "lr" in r]
    assert rates[-1] < 0.5 * max(rates)


def test_skipped_updates_are_told_and_a_lasting_failure_ends_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(load_recipe(write_recipe(tmp_path), ["log_every=3"]))
    inner = trainer.optimizer.step

    def poisoned(lr: float) -> torch.Tensor:
        if trainer.step_done in poison:
            for p in trainer.optimizer.params:
                if p.grad is not None:
                    p.grad.fill_(float("nan"))
        return inner(lr)

    trainer.optimizer.step = poisoned  # type: ignore[method-assign]
    poison = {1}
    with caplog.at_level(logging.WARNING):
        assert trainer.run().skipped == 1
    assert "1 updates skipped" in caplog.text

    recipe = write_recipe(tmp_path / "second")
    trainer = Trainer(load_recipe(recipe, ["log_every=3"]))
    with torch.no_grad():
        trainer.model.model.embed_tokens.weight[:] = float("nan")
    with pytest.raises(
        TrainingError, match="step 3: the last 3 updates were skipped; the loss is nan"
    ):
        trainer.run()


def test_recipes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    with pytest.raises(ConfigError, match="128 does not divide into 3"):
        main(recipe, ["data.micro_batches=3"])
    with pytest.raises(TrainingError, match="hold token 31, the model's vocabulary ends at 29"):
        main(recipe, ["model.vocab_size=30", "model.eos_token_id=29"])
    with pytest.raises(ConfigError, match="num_expertz"):
        main(recipe, ["model.num_expertz=3"])
    with pytest.raises(TrainingError, match=r"train\.bin does not exist"):
        main(recipe, [f"data.shards={tmp_path / 'none'}"])


def test_the_module_runs_a_recipe(tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "qnext.train", str(tmp_path / "none.toml"), "steps=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "none.toml does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_toy_walks_are_learnable(tmp_path: Path) -> None:
    write_shards(tmp_path, toy_documents(3, 0))
    tokens = TokenShards(tmp_path, "train").tokens
    assert tokens.max() == VOCAB - 1


def test_a_mixture_trains_and_long_documents_may_be_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    write_shards(tmp_path / "more", toy_documents(20, 5), "train")
    write_shards(tmp_path / "more", [], "heldout")
    text = recipe.read_text().replace(
        f'shards = "{tmp_path / "shards"}"',
        f'sources = [{{ shards = "{tmp_path / "shards"}", weight = 3 }}, '
        f'{{ shards = "{tmp_path / "more"}" }}]',
    )
    recipe.write_text(text)
    assert main(recipe, ["steps=3"]).finished
    resolved = load_recipe(tmp_path / "run" / "run.toml", [])
    assert [s.weight for s in resolved.data.sources] == [3, 1]
    with pytest.raises(TrainingError, match=r"document \d+ has \d+ tokens, data.seq_len is 32"):
        main(recipe, ["data.long_documents=refuse"])
    with pytest.raises(ConfigError, match="data: give either shards or sources"):
        main(recipe, ["data.shards=x"])
    with pytest.raises(ConfigError, match=r"seq_len 999 is more than model\.max_position_embedd"):
        main(recipe, ["data.seq_len=999"])


def _spoil(trainer: Trainer, at: set[int], how: str) -> None:
    """Damage the run once at each of some batches, counted from the start of the call."""
    inner, count = trainer._step, iter(range(10**6))

    def step(batches):  # type: ignore[no-untyped-def]
        if next(count) in at:
            with torch.no_grad():
                weight = trainer.model.model.embed_tokens.weight
                weight.copy_(weight * 40 if how == "jump" else weight * float("nan"))
        return inner(batches)

    trainer._step = step  # type: ignore[method-assign]


@pytest.mark.parametrize("how", ["jump", "nan"])
def test_a_lost_run_goes_back_and_on_with_other_data(tmp_path: Path, how: str) -> None:
    words = ["log_every=1", "checkpoint_every=2", "stability.loss_factor=2", "steps=12"]
    words += ["stability.loss_warmup=3", "dtype=bfloat16"]  # masters keep what the weights lose
    trainer = Trainer(load_recipe(write_recipe(tmp_path), words))
    _spoil(trainer, {7}, how)
    used = []
    take = trainer.loader.next

    def counted():  # type: ignore[no-untyped-def]
        used.append(trainer.loader.state_dict())
        return take()

    trainer.loader.next = counted  # type: ignore[method-assign]
    result = trainer.run()
    assert (result.steps, result.finished) == (12, True)
    assert trainer.watch.rollbacks == 1
    rows = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    [event] = [r for r in rows if r.get("event") == "rollback"]
    assert (event["step"], event["from"]) == (6, 8)
    steps = [r["step"] for r in rows if "loss" in r]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 9, 10, 11, 12]
    assert result.evaluation.loss < math.log(VOCAB)
    # 14 steps of two micro batches were taken from the stream, none twice.
    taken = trainer.position["sources"][0]["taken"]
    assert taken == 14 * 128


def test_a_run_that_fails_again_and_again_ends(tmp_path: Path) -> None:
    words = ["log_every=1", "checkpoint_every=1", "stability.max_rollbacks=2", "steps=20"]
    trainer = Trainer(load_recipe(write_recipe(tmp_path), words))
    _spoil(trainer, set(range(4, 100)), "nan")
    with pytest.raises(TrainingError, match="2 rollbacks were made"):
        trainer.run()
    # The last good checkpoint is still there.
    again = Trainer(load_recipe(tmp_path / "recipe.toml", words))
    again._resume()
    assert again.step_done == 4
    assert again.watch.rollbacks == 0


def test_training_goes_on_from_given_weights(tmp_path: Path, finished: Path) -> None:
    recipe = write_recipe(tmp_path)
    head, _, rest = recipe.read_text().partition("[model]")
    model = finished / "run" / "model"
    recipe.write_text(f'init_from = "{model}"\n' + head + rest[rest.index("[data]") :])
    start = Trainer(load_recipe(recipe, [])).evaluate()
    report = json.loads((finished / "run" / "evaluation.json").read_text())
    assert start.loss == pytest.approx(report["loss"], rel=0.02)
    assert main(recipe, ["steps=4", "optimizer.lr=1e-3"]).evaluation.loss < start.loss + 0.1
    with pytest.raises(ConfigError, match="give either model or init_from"):
        main(recipe, ["model.vocab_size=32"])


def test_where_the_figures_go(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "run" / "tensorboard"))
    events.Reload()
    assert {"loss", "mtp_loss", "grad_norm", "tokens_per_s", "heldout/bits_per_byte"} <= set(
        events.Tags()["scalars"]
    )
    rows = [json.loads(r) for r in (finished / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in rows if "loss" in r]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses)
    page = (finished / "run" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "held-out bits per byte" in page


def test_an_absent_wandb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from qnext.train import sinks

    real = importlib.util.find_spec
    monkeypatch.setattr(sinks, "find_spec", lambda n: None if n == "wandb" else real(n))
    with pytest.raises(ConfigError, match="wandb is not installed"):
        main(write_recipe(tmp_path), ["report.wandb_project=x"])
