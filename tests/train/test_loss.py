"""Losses against plain formulas, and packed batches against documents alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import randomise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy import MODEL

from qnext.checkpoint import build_model
from qnext.config import ModelConfig
from qnext.layers.model import CausalLM
from qnext.layers.packed import PackedBatch
from qnext.train import loss as losses
from qnext.train.config import LossConfig
from qnext.train.data import IGNORE_INDEX, TrainBatch, make_batch
from qnext.train.loss import Objective, Step, linear_cross_entropy, load_balance_loss


@dataclass
class Losses:
    total: Tensor
    main: Tensor
    mtp: Tensor
    balance: Tensor
    counts: Tensor


def compute_losses(
    model: CausalLM,
    batch: TrainBatch,
    config: LossConfig,
    valid: Sequence[int],
    tokens: int | None = None,
    seen: Tensor | None = None,
) -> Losses:
    step = Step(tuple(valid), tokens or len(batch.input_ids))
    return Losses(*Objective(model, config)(batch, step, seen))


PLAIN = LossConfig(mtp_weight=0.0, mtp_depth=0, load_balance=0.0)


def _model(**changes: object) -> CausalLM:
    model = build_model(ModelConfig.from_dict({**MODEL, **changes}), torch.float64)
    randomise(model, 5)
    return model.train()


def _sequences(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, MODEL["vocab_size"], n) for n in lengths]


def _grads(model: CausalLM, total: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def _same(got: Tensor, want: Tensor, name: str) -> None:
    """Equal up to the norms' fp32 interior."""
    error = float((got - want).norm() / want.norm().clamp(min=1e-4))
    assert error < 1e-5, (name, error)


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 2**31))
def test_chunked_cross_entropy_is_cross_entropy(tokens: int, chunk: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(-1, 9, (tokens,), generator=rng)
    labels[labels < 0] = IGNORE_INDEX
    count = max(int((labels >= 0).sum()), 1)
    whole = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum") / count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK_LOGITS", chunk * 9)
        ours = linear_cross_entropy(hidden, weight, labels, count)
    torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-12)
    got = torch.autograd.grad(3 * ours, (hidden, weight))
    want = torch.autograd.grad(3 * whole, (hidden, weight))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_cross_entropy_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 14)
    hidden, weight = torch.randn(5, 4), torch.randn(7, 4)
    labels = torch.tensor([1, IGNORE_INDEX, 3, 6, 0])
    want = F.cross_entropy(hidden @ weight.t(), labels)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, 4), want)


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return out


def test_the_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, width, vocab = 2000, 8, 300
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    labels = torch.randint(vocab, (tokens,))
    sizes = []
    for budget in (vocab * 128, vocab * 512):
        monkeypatch.setattr(losses, "CHUNK_LOGITS", budget)
        with _Largest() as largest:
            linear_cross_entropy(hidden, weight, labels, tokens).backward()
        assert largest.size <= max(budget, tokens * width)
        sizes.append(largest.size)
    assert sizes[0] < sizes[1] < tokens * vocab / 3
    with _Largest() as largest:  # the measure sees them where they do exist
        F.cross_entropy(hidden @ weight.t(), labels)
    assert largest.size == tokens * vocab


def test_chunks_have_a_memory_bound_at_any_vocabulary() -> None:
    for vocab in (32, 8192, 151_936, 248_320):
        assert losses.chunk_tokens(vocab) * vocab <= losses.CHUNK_LOGITS
        assert losses.chunk_tokens(vocab) >= 512


def test_balance_is_one_when_uniform_and_the_experts_when_collapsed() -> None:
    uniform = load_balance_loss(torch.full((8,), 1 / 8), torch.full((8,), 5))
    torch.testing.assert_close(uniform, torch.tensor(1.0))
    one = F.one_hot(torch.tensor(3), 8)
    torch.testing.assert_close(load_balance_loss(one.float(), 9 * one), torch.tensor(8.0))


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_batch_is_its_documents_alone(tied: bool) -> None:
    model = _model(tie_word_embeddings=tied)
    config = LossConfig(mtp_weight=0.3, mtp_depth=2, load_balance=0.0)
    sequences = _sequences(7, 1, 70, 3)  # more than one chunk of the delta rule, and no label
    packed = make_batch(sequences, 2)
    together = compute_losses(model, packed, config, packed.valid)
    want = _grads(model, together.total)
    alone = [make_batch([s], 2) for s in sequences]
    parts = [compute_losses(model, one, config, packed.valid) for one in alone]
    torch.testing.assert_close(sum(p.main for p in parts), together.main)
    torch.testing.assert_close(sum(p.mtp for p in parts), together.mtp)
    got = _grads(model, sum(p.total for p in parts))  # type: ignore[arg-type]
    assert got.keys() == want.keys()
    for name in want:
        _same(got[name], want[name], name)


@settings(max_examples=12)
@given(st.lists(st.sampled_from([1, 2, 3, 4, 5, 63, 64, 65, 90]), min_size=2, max_size=5))
def test_any_packing_gives_the_gradients_of_the_documents(lengths: list[int]) -> None:
    """Boundaries anywhere: of one token, below the width of the convolution, around a chunk."""
    model = _model()
    config = LossConfig(mtp_weight=0.3, mtp_depth=2, load_balance=0.0)
    sequences = _sequences(*lengths)
    packed = make_batch(sequences, 2)
    valid = [max(n, 1) for n in packed.valid]
    want = _grads(model, compute_losses(model, packed, config, valid).total)
    alone = [make_batch([s], 2) for s in sequences]
    total = sum(compute_losses(model, one, config, valid).total for one in alone)
    got = _grads(model, total)  # type: ignore[arg-type]
    for name in want:
        _same(got[name], want[name], name)


def _naive_mtp(model: CausalLM, sequence: np.ndarray, depth: int) -> list[Tensor]:
    """Per depth, the cross-entropies of one sequence by the written equations, no padding."""
    ids = torch.from_numpy(sequence)
    hidden = model.hidden_states(ids, PackedBatch.of([len(ids)]))
    out = []
    for d in range(1, depth + 1):
        # Depth d: row i knows token i + d and predicts token i + d + 1.
        hidden = hidden[: len(ids) - d]
        hidden = model.draft_states(hidden, ids[d:], PackedBatch.of([len(hidden)]))
        logits = model.logits(hidden[:-1])
        out.append(F.cross_entropy(logits, ids[d + 1 :], reduction="none"))
    return out


@pytest.mark.parametrize("depth", [1, 3])
def test_mtp_loss_is_the_written_one(depth: int) -> None:
    model = _model()
    sequences = _sequences(9, 6, 12)
    batch = make_batch(sequences, depth)
    config = LossConfig(mtp_weight=1.0, mtp_depth=depth, load_balance=0.0)
    ours = compute_losses(model, batch, config, batch.valid)
    per_depth: list[list[Tensor]] = [[] for _ in range(depth)]
    for sequence in sequences:
        for rows, values in zip(per_depth, _naive_mtp(model, sequence, depth), strict=True):
            rows.append(values)
    want = torch.stack([torch.cat(rows).mean() for rows in per_depth]).mean()
    torch.testing.assert_close(ours.mtp, want, rtol=1e-10, atol=0)
    grads, expected = _grads(model, ours.total - ours.main), _grads(model, want)
    assert "mtp.fc.weight" in expected
    main = compute_losses(model, batch, PLAIN, batch.valid)
    base = _grads(model, main.total)
    for name, value in expected.items():
        got = grads[name] - base.get(name, 0)
        _same(got, value, name)


def test_micro_batches_add_up_to_the_step() -> None:
    model = _model()
    config = LossConfig(mtp_weight=0.3, mtp_depth=1, load_balance=0.0, router_z=0.1)
    sequences = _sequences(20, 9, 30, 5)
    step = make_batch(sequences, 1)
    want = _grads(model, compute_losses(model, step, config, step.valid).total)
    pieces: list[TrainBatch] = [make_batch(sequences[:1], 1), make_batch(sequences[1:], 1)]
    totals = [compute_losses(model, p, config, step.valid, 64).total for p in pieces]
    got = _grads(model, totals[0] + totals[1])
    for name in want:
        _same(got[name], want[name], name)


def test_balance_counts_the_whole_step() -> None:
    model = _model()
    config = LossConfig(mtp_weight=0.0, mtp_depth=0, load_balance=1.0)
    batch = make_batch(_sequences(24), 0)
    alone = compute_losses(model, batch, config, batch.valid)
    assert len(alone.counts) == 2
    assert all(int(c.sum()) == 24 * 2 for c in alone.counts)
    lopsided = torch.stack([F.one_hot(c.argmax(), 4) * 10_000 for c in alone.counts])
    seen = compute_losses(model, batch, config, batch.valid, None, lopsided)
    assert float(seen.balance) > float(alone.balance) > 0.5


def test_router_z_is_added_for_every_sparse_layer() -> None:
    model = _model()
    batch = make_batch(_sequences(12), 0)
    base = compute_losses(model, batch, PLAIN, batch.valid)
    more = compute_losses(model, batch, PLAIN.model_copy(update={"router_z": 0.5}), batch.valid)
    assert more.total.item() > base.total.item()
