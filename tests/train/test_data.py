"""Batches: every token once an epoch, nothing mixed, the same again after a restart."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import write_shards

from qnext.errors import TrainingError
from qnext.train.data import (
    IGNORE_INDEX,
    PackedLoader,
    TokenShards,
    heldout_batches,
    make_batch,
    prefetch,
)


def _shards(folder: Path, lengths: list[int]) -> TokenShards:
    """Documents of consecutive numbers, so that every token is known by its value."""
    bounds = np.cumsum([0, *lengths])
    write_shards(folder, [list(range(a, b)) for a, b in pairwise(bounds)])
    return TokenShards(folder, "train")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 3))
def test_labels_stay_inside_their_sequence(lengths: list[int], depth: int) -> None:
    sequences = [np.arange(n) + 10 * i for i, n in enumerate(lengths)]
    batch = make_batch(sequences, depth)
    at = 0
    for sequence in sequences:
        for i in range(len(sequence)):
            assert batch.input_ids[at + i] == sequence[i]
            assert batch.packed.positions[at + i] == i
            for d in range(depth + 1):
                ahead = i + d + 1
                want = sequence[ahead] if ahead < len(sequence) else IGNORE_INDEX
                assert batch.labels[d, at + i] == want
        at += len(sequence)
    assert batch.packed.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()
    assert batch.valid == tuple(sum(max(n - d - 1, 0) for n in lengths) for d in range(depth + 1))


def test_an_epoch_holds_every_token_once_in_full_batches(tmp_path: Path) -> None:
    shards = _shards(tmp_path, [5, 1, 23, 8, 11])  # 48 tokens: 4 batches of 12
    loader = PackedLoader([(shards, 1)], tokens=12, seq_len=7, depth=1, seed=0)
    epochs = []
    for _ in range(2):
        batches = [loader.next() for _ in range(4)]
        for batch in batches:
            assert len(batch.input_ids) == 12
            assert max(batch.packed.lengths) <= 7
            for piece in batch.input_ids.split(batch.packed.lengths):
                assert (piece.diff() == 1).all()  # one document, in order
        ids = torch.cat([b.input_ids for b in batches]).tolist()
        assert Counter(ids) == Counter(range(48))
        epochs.append(ids)
    assert epochs[0] != epochs[1]
    place = {"epoch": 2, "index": 0, "offset": 0, "taken": 96}
    assert loader.state_dict() == {"sources": [place]}


def test_long_documents_are_cut_evenly(tmp_path: Path) -> None:
    loader = PackedLoader([(_shards(tmp_path, [33]), 1)], tokens=33, seq_len=32, depth=0, seed=0)
    assert sorted(loader.next().packed.lengths) == [16, 17]


@given(st.integers(0, 12), st.integers(1, 20))
def test_the_stream_goes_on_from_any_position(done: int, tokens: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        shards = _shards(Path(folder), [5, 1, 23, 8, 11])
        first = PackedLoader([(shards, 1)], tokens, 7, 1, seed=4)
        for _ in range(done):
            first.next()
        second = PackedLoader([(shards, 1)], tokens, 7, 1, seed=4)
        second.load_state_dict(first.state_dict())
        for _ in range(5):
            a, b = first.next(), second.next()
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.labels, b.labels)
            assert a.packed.lengths == b.packed.lengths


def test_seeds_give_different_orders(tmp_path: Path) -> None:
    shards = _shards(tmp_path, [4] * 12)
    batches = [PackedLoader([(shards, 1)], 48, 8, 0, seed).next().input_ids for seed in (0, 0, 1)]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_prefetch_gives_the_loader_s_batches_and_positions(tmp_path: Path) -> None:
    shards = _shards(tmp_path, [5, 1, 23, 8, 11])
    plain, ahead = (PackedLoader([(shards, 1)], 10, 7, 1, seed=0) for _ in range(2))
    stream = prefetch(ahead)
    for _ in range(6):
        batch, position = next(stream)
        assert torch.equal(batch.input_ids, plain.next().input_ids)
        assert position == plain.state_dict()
    stream.close()


def test_an_error_of_the_thread_reaches_the_loop(tmp_path: Path) -> None:
    loader = PackedLoader([(_shards(tmp_path, [5]), 1)], 5, 5, 0, seed=0)
    stream = loader.streams[0]
    stream._starts = stream._stops = np.zeros(0, dtype=np.int64)
    with pytest.raises(IndexError):
        next(prefetch(loader))


def test_heldout_covers_every_document(tmp_path: Path) -> None:
    shards = _shards(tmp_path, [5, 1, 23, 8, 11])
    batches = list(heldout_batches(shards, tokens=20, seq_len=7, depth=1))
    assert torch.cat([b.input_ids for b in batches]).tolist() == list(range(48))
    assert all(len(b.input_ids) <= 20 for b in batches)


def test_missing_and_contradicting_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"train\.bin does not exist"):
        TokenShards(tmp_path, "train")
    shards = _shards(tmp_path, [5, 6])
    assert len(shards) == 2
    (tmp_path / "train.bin").write_bytes(b"\0" * 8)
    with pytest.raises(TrainingError, match=r"ends at 11, but .* holds 4 tokens"):
        TokenShards(tmp_path, "train")


def _mixture(folder: Path, weights: list[float]) -> list[tuple[TokenShards, float]]:
    out = []
    for n, weight in enumerate(weights):
        write_shards(folder / str(n), [[n] * (3 + i % 7) for i in range(9 + n)])
        out.append((TokenShards(folder / str(n), "train"), weight))
    return out


@given(st.lists(st.floats(0.1, 9), min_size=1, max_size=4), st.integers(0, 9))
def test_a_mixture_keeps_its_weights_and_goes_on(weights: list[float], done: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        sources = _mixture(Path(folder), weights)
        first = PackedLoader(sources, 50, 8, 0, seed=2)
        count = np.zeros(len(weights))
        for _ in range(done):
            ids = first.next().input_ids
            count += np.bincount(ids.numpy(), minlength=len(weights))
        want = np.asarray(weights) / sum(weights) * 50 * done
        # One sequence (at most 8 tokens) of every other source is all that may be missing.
        assert np.abs(count - want).max() <= 8 * len(weights)
        second = PackedLoader(sources, 50, 8, 0, seed=2)
        second.load_state_dict(first.state_dict())
        for _ in range(3):
            assert torch.equal(first.next().input_ids, second.next().input_ids)


@pytest.mark.parametrize("parts", [2, 3])
def test_ranks_share_one_stream(tmp_path: Path, parts: int) -> None:
    sources = _mixture(tmp_path, [1, 2])
    whole = PackedLoader(sources, 20, 8, 1, seed=0)
    shared = [PackedLoader(sources, 20, 8, 1, 0, part, parts) for part in range(parts)]
    for _ in range(3):
        for loader in shared:
            assert torch.equal(loader.next().input_ids, whole.next().input_ids)
    assert all(loader.state_dict() == whole.state_dict() for loader in shared)


def test_a_manifest_that_lies_is_refused(tmp_path: Path) -> None:
    _shards(tmp_path, [5])
    (tmp_path / "manifest.json").write_text('{"dtype": "int8", "train": {"bytes": 1}}')
    with pytest.raises(TrainingError, match="has dtype 'int8' and splits train"):
        TokenShards(tmp_path, "train")
