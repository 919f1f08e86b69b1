"""Streaming: every tensor of a folder from disk into its place, several at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod

import torch
from torch import Tensor, nn

from qnext.checkpoint.census import Layout
from qnext.checkpoint.reader import TORCH_DTYPES, Reader, SafetensorsFolder
from qnext.errors import CheckpointError
from qnext.quant.format import PackedTensor
from qnext.quant.surgery import matrices
from qnext.weights import DiskTensor, whole

Progress = Callable[[int, int], None]

SPAN = 32 << 20
"""Bytes of a job: larger tensors are cut, smaller ones share a job."""
CHUNK = 1 << 20
"""Bytes that are read and checked for NaN while they are in the cache of the processor."""


def fill(
    model: nn.Module,
    layout: Layout,
    files: SafetensorsFolder,
    progress: Progress | None = None,
    *,
    threads: int | None = None,
) -> None:
    """Stream the files into the parameters.

    Beside the parameters each thread holds a chunk of a tensor, or one tensor whose rows move;
    bytes that are already right go straight to their place.

    Args:
        model: allocated, on any device; parameters that the layout does not name stay.
        layout: of the files.
        files: where the tensors are.
        progress: called with (bytes done, bytes in all) as they arrive.
        threads: default one per processor, at most 8.

    Raises:
        CheckpointError: NaN or infinite values, contents that a format does not allow, a tied
            head that differs; ``DamagedFile`` for files that shrink while they are read.
    """
    with files.opened() as reader, torch.no_grad():
        work = _Filler(model, layout, files, reader, progress)
        count = threads or min(8, os.cpu_count() or 1)
        if count == 1:
            for job in work.jobs():
                work.run(job)
        else:
            pool = ThreadPoolExecutor(count, thread_name_prefix="load")
            try:
                for done in [pool.submit(work.run, job) for job in work.jobs()]:
                    done.result()
            finally:
                pool.shutdown(cancel_futures=True)
        work.check_repeated()
    filled = {part.param for rule in layout.tensors.values() for part in rule.parts}
    for name, matrix in matrices(model).items():
        if name in filled:
            matrix.settle()


# Tensor name, first and last byte; a whole tensor where the bytes need work.
Task = tuple[str, int, int]


class _Filler:
    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        files: SafetensorsFolder,
        reader: Reader,
        progress: Progress | None,
    ) -> None:
        self._params: dict[str, Tensor] = dict(model.named_parameters())
        self._matrices = matrices(model)
        self._layout, self._files, self._reader = layout, files, reader
        self._progress, self._done, self._lock = progress, 0, threading.Lock()
        entries = files.entries
        self._total = sum(e.nbytes for n, e in entries.items() if n in layout.tensors)
        self._pinned = any(p.is_cuda for p in self._params.values())
        self._local = threading.local()

    def jobs(self) -> Iterator[list[Task]]:
        """Tasks in the order of the files, in jobs of about ``SPAN`` bytes."""
        job: list[Task] = []
        size = 0
        for name, entry in self._files.entries.items():
            rule = self._layout.tensors.get(name)
            if rule is None or rule.optional:
                continue
            step = SPAN if self._direct(rule) is not None else entry.nbytes
            for begin in range(0, max(entry.nbytes, 1), max(step, 1)):
                end = min(begin + step, entry.nbytes)
                job.append((name, begin, end))
                size += end - begin
                if size >= SPAN:
                    yield job
                    job, size = [], 0
        if job:
            yield job

    def run(self, job: list[Task]) -> None:
        """Load some tensors, or a piece of one."""
        with torch.no_grad():
            for name, begin, end in job:
                rule = self._layout.tensors[name]
                target = self._direct(rule)
                if target is not None:
                    self._read(name, target, begin, end)
                else:
                    self._place(name, rule)
                self._advance(end - begin)

    def _advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)

    def _direct(self, rule: DiskTensor) -> Tensor | None:
        """What a tensor fills as it is, byte for byte or cast; None if it needs more work."""
        if len(rule.parts) != 1 or rule.parts[0].take is not whole:
            return None
        part = rule.parts[0]
        if isinstance(rule, PackedTensor):
            field = self._matrices[part.param].plain_field(rule)
        else:
            field = self._params[part.param]
        target = None if field is None else part.put(field)
        return target if target is not None and target.is_contiguous() else None

    def _read(self, name: str, target: Tensor, begin: int, end: int) -> None:
        flat, kind = target.detach().reshape(-1), TORCH_DTYPES[self._files.entries[name].dtype]
        size, here = kind.itemsize, target.device.type == "cpu" and target.dtype == kind
        for at in range(begin, end, CHUNK):
            piece = flat[at // size : min(at + CHUNK, end) // size]
            read = piece if here else self._staging(kind, piece.numel())
            self._reader.into(name, read, at)
            self._check(name, read)
            if not here:
                piece.copy_(read)

    def _staging(self, dtype: torch.dtype, count: int) -> Tensor:
        """Host memory of this thread, used again and again; pinned where a GPU reads it."""
        held: Tensor | None = getattr(self._local, "staging", None)
        if held is None or len(held) < count * dtype.itemsize:
            size = max(count * dtype.itemsize, CHUNK)
            held = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
            self._local.staging = held
        return held[: count * dtype.itemsize].view(dtype)

    def _place(self, name: str, rule: DiskTensor) -> None:
        entry = self._files.entries[name]
        tensor = self._staging(TORCH_DTYPES[entry.dtype], prod(entry.shape)).view(entry.shape)
        self._reader.into(name, tensor)
        self._check(name, tensor)
        if isinstance(rule, PackedTensor):
            self._check_value(rule, tensor)
            for part in rule.parts:
                self._matrices[part.param].place(rule, part, tensor)
        else:
            for part in rule.parts:
                part.put(self._params[part.param]).copy_(part.take(tensor))

    def _check(self, name: str, tensor: Tensor) -> None:
        if not is_finite(tensor):
            raise CheckpointError(
                f"{self._files.folder}: {name} holds NaN or infinite values",
                hint="the file is damaged or the training run diverged",
            )

    def _check_value(self, rule: PackedTensor, tensor: Tensor) -> None:
        wanted = rule.piece.value
        if wanted is not None and tuple(tensor.tolist()) != wanted:
            raise CheckpointError(
                f"{self._files.folder}: {rule.name} is {tensor.tolist()}, expected {list(wanted)}",
                hint="tensors of different modules were exchanged, or the config is another's",
            )

    def check_repeated(self) -> None:
        """A tensor that repeats a parameter must equal it."""
        for name, rule in self._layout.tensors.items():
            if rule.optional and name in self._files.entries:
                twin = self._params[rule.parts[0].param]
                tensor = self._reader.tensor(name)
                self._check(name, tensor)
                if not torch.equal(twin, tensor.to(twin)):
                    raise CheckpointError(
                        f"{self._files.folder}: tie_word_embeddings is set, but {name} differs "
                        "from the embedding",
                        hint="set tie_word_embeddings to false in config.json",
                    )
                self._advance(tensor.nbytes)


def is_finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinities; whole numbers always do not."""
    if x.dtype == torch.float8_e4m3fn:  # no infinities; NaN has all bits but the sign set
        octets = x.reshape(-1).view(torch.uint8).numpy() if x.device.type == "cpu" else None
        if octets is not None:
            return not octets.size or int((octets & 127).max()) < 127
        return not bool(x.isnan().any())
    if not x.is_floating_point() or not x.numel():
        return True
    # The sum is quick but may overflow, so only the long look condemns.
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
