"""Packed batches from token shards: deterministic, resumable, nothing lost, nothing mixed.

Documents are cut evenly into sequences of at most ``seq_len`` tokens; the sequences of a source are
shuffled by (seed, epoch) and laid one after the other until a batch has exactly its tokens. Every
sequence starts at position zero with empty state, so a packed document sees only itself. Of several
sources the one that is furthest behind its share of the tokens gives the next sequence.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qnext.errors import TrainingError
from qnext.layers.packed import PackedBatch
from qnext.parallel.context import cut

IGNORE_INDEX = -100


class TokenShards:
    """One split: flat tokens (uint16 or uint32) in a memory map, and where documents start.

    Raises:
        TrainingError: files missing or not matching each other.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        folder = Path(folder)
        flat, offsets = folder / f"{split}.bin", folder / f"{split}.offsets.npy"
        for file in (flat, offsets, folder / "manifest.json"):
            if not file.is_file():
                raise TrainingError(
                    f"{file} does not exist", hint="run the data preparation of the recipe first"
                )
        self.folder, self.split = folder, split
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        kind = manifest.get("dtype", "uint16")
        if kind not in ("uint16", "uint32") or split not in manifest:
            raise TrainingError(
                f"{folder / 'manifest.json'} has dtype {kind!r} and splits "
                f"{', '.join(k for k, v in manifest.items() if isinstance(v, dict)) or 'none'}",
                hint=f"wanted are uint16 or uint32, and a split {split}",
            )
        dtype = f"<u{np.dtype(kind).itemsize}"
        empty = not flat.stat().st_size  # which cannot be mapped
        self.tokens = np.zeros(0, dtype) if empty else np.memmap(flat, dtype=dtype, mode="r")
        self.offsets = np.load(offsets, allow_pickle=False)
        self.num_bytes = int(manifest[split]["bytes"])
        if not len(self.offsets) or self.offsets[-1] != len(self.tokens):
            raise TrainingError(
                f"{offsets} ends at {self.offsets[-1] if len(self.offsets) else 'nothing'}, but "
                f"{flat} holds {len(self.tokens)} tokens"
            )

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, the closing end-of-text included."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1


class Documents(Protocol):
    """Documents to score: :class:`TokenShards`, or others like them."""

    num_bytes: int

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class TrainBatch:
    """What one micro step needs.

    Attributes:
        input_ids: (T,) int64.
        labels: (depth + 1, T) int64; row d holds the token d + 1 ahead inside the same
            sequence, IGNORE_INDEX where there is none.
        packed: how the tokens are cut.
        valid: labels that count, for each depth; those of the other data-parallel ranks' batches
            of the same micro step included.
    """

    input_ids: Tensor
    labels: Tensor
    packed: PackedBatch
    valid: tuple[int, ...]

    def pin(self) -> TrainBatch:
        """Into page-locked memory, from which a GPU copies without the host waiting."""
        packed = replace(
            self.packed,
            positions=self.packed.positions.pin_memory(),
            cu_seqlens=self.packed.cu_seqlens.pin_memory(),
        )
        ids, labels = self.input_ids.pin_memory(), self.labels.pin_memory()
        return TrainBatch(ids, labels, packed, self.valid)

    def to(self, device: torch.device) -> TrainBatch:
        """Copy to a device; without waiting, if pinned."""
        packed = replace(
            self.packed,
            positions=self.packed.positions.to(device, non_blocking=True),
            cu_seqlens=self.packed.cu_seqlens.to(device, non_blocking=True),
        )
        ids = self.input_ids.to(device, non_blocking=True)
        labels = self.labels.to(device, non_blocking=True)
        return TrainBatch(ids, labels, packed, self.valid)

    def cut(self, index: int, count: int) -> TrainBatch:
        """Piece ``index`` of ``count``, for ranks that share the tokens of a batch."""
        if count == 1:
            return self
        packed, rows = cut(self.packed, index, count)
        return TrainBatch(self.input_ids[rows], self.labels[:, rows], packed, self.valid)


def make_batch(sequences: list[np.ndarray], depth: int) -> TrainBatch:
    """Pack sequences; labels never cross from one to the next."""
    lengths = [len(s) for s in sequences]
    flat = torch.from_numpy(np.concatenate(sequences).astype(np.int64))
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    starts = np.repeat(bounds[:-1], lengths)
    ends = np.repeat(bounds[1:], lengths)
    place = np.arange(bounds[-1])
    labels = torch.full((depth + 1, len(flat)), IGNORE_INDEX)
    for d in range(depth + 1):
        inside = torch.from_numpy(place + d + 1 < ends)
        labels[d, inside] = flat[torch.from_numpy(place + d + 1)[inside]]
    packed = PackedBatch(
        positions=torch.from_numpy(place - starts),
        lengths=tuple(lengths),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        context_lens=(0,) * len(lengths),
    )
    valid = tuple((labels != IGNORE_INDEX).sum(1).tolist())
    return TrainBatch(flat, labels, packed, valid)


class _Stream:
    """The endless, shuffled sequences of one source."""

    def __init__(self, shards: TokenShards, seq_len: int, key: tuple[int, ...]) -> None:
        self.shards, self.key = shards, key
        self.epoch, self.index, self.offset, self.taken = 0, 0, 0, 0
        self._order: np.ndarray | None = None
        self._starts, self._stops = _segments(shards.offsets, seq_len)

    def state_dict(self) -> dict[str, int]:
        return {
            "epoch": self.epoch, "index": self.index, "offset": self.offset, "taken": self.taken
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.index, self.offset = state["epoch"], state["index"], state["offset"]
        self.taken = state["taken"]
        self._order = None

    def next(self, room: int) -> np.ndarray:
        """The next sequence, or as much of it as there is room for; the rest comes next."""
        if self._order is None:
            seed, *rest = self.key
            rng = np.random.default_rng((seed, self.epoch, *rest))
            self._order = rng.permutation(len(self._starts))
        number = self._order[self.index]
        start, stop = self._starts[number] + self.offset, self._stops[number]
        piece = self.shards.tokens[start : min(stop, start + room)]
        self.offset += len(piece)
        self.taken += len(piece)
        if start + len(piece) == stop:
            self.offset, self.index = 0, self.index + 1
        if self.index >= len(self._order):
            self.epoch, self.index, self._order = self.epoch + 1, 0, None
        return piece


class PackedLoader:
    """An endless, resumable stream of :class:`TrainBatch`.

    Data-parallel ranks read one stream: of every ``parts`` batches each makes its own. The stream,
    and the position that ``state_dict`` describes (before the next batch), do not depend on how
    many ranks there are.

    Args:
        sources: shards and the share of the tokens that should come from each (any scale).
        tokens: of a batch.
        seq_len: tokens of the longest sequence.
        depth: of MTP.
        seed: of the shuffling.
        part: number of this rank among those that share the stream.
        parts: how many those are.
    """

    def __init__(
        self,
        sources: Sequence[tuple[TokenShards, float]],
        tokens: int,
        seq_len: int,
        depth: int,
        seed: int,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        self.tokens, self.depth, self.part, self.parts = tokens, depth, part, parts
        self.weights = [weight for _, weight in sources]
        self.streams = [
            _Stream(shards, seq_len, (seed, n) if n else (seed,))
            for n, (shards, _) in enumerate(sources)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Per source: epoch, place in its order, token offset in that sequence, tokens taken."""
        return {"sources": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        for stream, saved in zip(self.streams, state["sources"], strict=True):
            stream.load_state_dict(saved)

    def next(self) -> TrainBatch:
        """The next batch of exactly ``tokens`` tokens."""
        packs = [self._pack() for _ in range(self.parts)]
        lengths = [len(sequence) for pack in packs for sequence in pack]
        valid = tuple(sum(max(n - d - 1, 0) for n in lengths) for d in range(self.depth + 1))
        return replace(make_batch(packs[self.part], self.depth), valid=valid)

    def _pack(self) -> list[np.ndarray]:
        sequences: list[np.ndarray] = []
        room = self.tokens
        while room:
            behind = min(
                range(len(self.streams)),
                key=lambda n: (self.streams[n].taken / self.weights[n], n),
            )
            sequences.append(self.streams[behind].next(room))
            room -= len(sequences[-1])
        return sequences


def _segments(offsets: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """First and end of every sequence: documents cut into the fewest pieces, of even length."""
    sizes = np.diff(offsets)
    pieces = -(-sizes // seq_len)
    document = np.repeat(np.arange(len(sizes)), pieces)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    size, count, base = sizes[document], pieces[document], offsets[:-1][document]
    return base + nth * size // count, base + (nth + 1) * size // count


def prefetch(
    loader: PackedLoader, ahead: int = 3, pin: bool = False
) -> Generator[tuple[TrainBatch, dict[str, Any]], None, None]:
    """Batches built (and pinned) on a thread, each with the loader's position after it."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def offer(item: Any) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            while not stop.is_set():
                batch = loader.next()
                offer((batch.pin() if pin else batch, loader.state_dict()))
        except BaseException as error:  # handed to the consumer below
            offer(error)

    thread = threading.Thread(target=work, daemon=True, name="qnext-data")
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def heldout_batches(
    shards: Documents, tokens: int, seq_len: int, depth: int
) -> Iterator[TrainBatch]:
    """Every document once, in order, in batches of about ``tokens`` tokens."""
    sequences: list[np.ndarray] = []
    size = 0
    for index in range(len(shards)):
        document = shards.document(index)
        for start in range(0, len(document), seq_len):
            piece = document[start : start + seq_len]
            if size + len(piece) > tokens and sequences:
                yield make_batch(sequences, depth)
                sequences, size = [], 0
            sequences.append(piece)
            size += len(piece)
    if sequences:
        yield make_batch(sequences, depth)
