"""Read a checkpoint: chunk by chunk, a few threads, each chunk checked before its bytes are believed.

What is wanted is planned first: which parts of which chunks go to which place. Then every chunk is read once,
checked, and copied from. A chunk's share of an n-D part is a flat range, so it is again a few boxes. Memory beyond
the targets is one chunk a thread.

Files are not mapped into memory: a disk that fails would kill the process instead of raising an error, and checking
the chunks and copying from the mapping cost 0.7-1.2 CPU seconds a GB where this costs 0.25.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_ds.checkpoint.directory import check_size, find
from megatron_ds.checkpoint.manifest import Part, TensorRecord
from megatron_ds.checkpoint.safetensors_header import DTYPES
from megatron_ds.errors import CheckpointError, nearest
from megatron_ds.files import checksum
from megatron_ds.files.direct_io import ALIGNMENT, DirectFile, aligned_buffer, aligned_up
from megatron_ds.shard.boxes import Box, intersection, rectangles

THREADS = 4


@dataclass(frozen=True)
class Request:
    """Copy ``box`` of a tensor into ``target``: of the box's shape, any strides, dtype and device."""

    record: TensorRecord
    box: Box
    target: torch.Tensor


@dataclass(frozen=True)
class _Copy:
    """The bytes ``[first, last)`` of a chunk's file hold what ``shared`` asks of ``part`` (among other elements)."""

    request: Request
    part: Part
    shared: Box
    first: int
    last: int


class Checkpoint:
    """A checkpoint on disk, read one tensor, or one box of a tensor, at a time.

    Args:
        path: a run's checkpoint directory (its latest is meant) or one step's directory.
        verify: take the checksum of every chunk that is read; otherwise only the bytes that are needed are read.

    Attributes:
        directory: the step's directory. step, world_size: of the save. meta: what ``save`` was given.

    Raises:
        CheckpointError: missing, incomplete or damaged, here or at the read that touches the damage.
    """

    def __init__(self, path: str | Path, verify: bool = True):
        self.directory, self.manifest = find(path)
        self.verify = verify
        self.step, self.world_size, self.meta = self.manifest.step, self.manifest.world_size, self.manifest.meta
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-reader")
        self._local = threading.local()
        self._open: dict[int, DirectFile] = {}

    def kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for kind, _ in self.manifest.tensors))

    def names(self, kind: str = "param") -> list[str]:
        return [name for of_kind, name in self.manifest.tensors if of_kind == kind]

    def record(self, name: str, kind: str = "param") -> TensorRecord:
        record = self.manifest.tensors.get((kind, name))
        if record is None:
            raise CheckpointError(f"{self.directory} holds no {kind} {name!r}{nearest(name, self.names(kind))}")
        return record

    def shape(self, name: str, kind: str = "param") -> tuple[int, ...]:
        return self.record(name, kind).shape

    def dtype(self, name: str, kind: str = "param") -> torch.dtype:
        return DTYPES[self.record(name, kind).dtype]

    def read(self, name: str, kind: str = "param") -> torch.Tensor:
        """The whole tensor, in the dtype it was saved in, as a new CPU tensor."""
        record = self.record(name, kind)
        whole = torch.empty(record.shape, dtype=DTYPES[record.dtype])
        self.fill([Request(record, Box((0,) * len(record.shape), record.shape), whole)])
        return whole

    def fill(self, requests: Sequence[Request]) -> None:
        """Carry out all requests. After an error some targets may be filled.

        Raises:
            CheckpointError: a chunk that was needed is damaged or cannot be read.
        """
        jobs: dict[tuple[int, int], list[_Copy]] = {}
        for request in requests:
            for copy in self._copies(request):
                chunks = range(copy.first // self.manifest.chunk_bytes, -(-copy.last // self.manifest.chunk_bytes))
                for chunk in chunks:
                    jobs.setdefault((copy.part.file, chunk), []).append(copy)
        # In file order, so that the disk reads forward.
        self._run([self._pool.submit(self._read_chunk, *key, jobs[key]) for key in sorted(jobs)])

    def check_everything(
        self, each: Callable[[int], None] = lambda size: None, files: Iterable[int] | None = None
    ) -> list[str]:
        """Read and check every byte, or those of some files; the list of what is wrong. ``each`` is told the bytes of
        each file done."""
        problems: list[str] = []
        for index in range(len(self.manifest.files)) if files is None else files:
            file = self.manifest.files[index]
            try:
                self._file(index)
                chunks = -(-file.size // self.manifest.chunk_bytes)
                futures = [self._pool.submit(self._read_chunk, index, chunk, None) for chunk in range(chunks)]
                problems += [str(error) for future in futures if (error := future.exception()) is not None]
            except CheckpointError as error:
                problems.append(str(error))
            each(file.size)
        return problems

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for file in self._open.values():
            file.close()
        self._open.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _copies(self, request: Request) -> list[_Copy]:
        record, box = request.record, request.box
        width = DTYPES[record.dtype].itemsize
        copies, found = [], 0
        for part in record.parts:
            shared = intersection(part.box, box)
            if shared is None:
                continue
            found += shared.numel
            self._file(part.file)
            ends = tuple(o + s - 1 for o, s in zip(shared.offset, shared.shape))
            first = part.start + _flat_index(shared.offset, part.box) * width
            copies.append(_Copy(request, part, shared, first, part.start + (_flat_index(ends, part.box) + 1) * width))
        if found != box.numel:
            raise ValueError(f"{record.kind} of {record.name}: {box} is not inside its shape {list(record.shape)}")
        return copies

    def _file(self, index: int) -> DirectFile:
        """The open file, its size checked."""
        if index not in self._open:
            file = self.manifest.files[index]
            check_size(self.directory, file)
            self._open[index] = DirectFile.open(self.directory / file.name)
        return self._open[index]

    def _read_chunk(self, index: int, chunk: int, copies: list[_Copy] | None) -> None:
        """Read one chunk, check it, and copy out of it; no copies: only check it."""
        file, chunk_bytes = self.manifest.files[index], self.manifest.chunk_bytes
        start, stop = chunk * chunk_bytes, min((chunk + 1) * chunk_bytes, file.size)
        check = self.verify or copies is None
        if not check and copies:
            start = max(start, min(copy.first for copy in copies) // ALIGNMENT * ALIGNMENT)
            stop = min(stop, max(copy.last for copy in copies))
        if not hasattr(self._local, "buffer"):
            pin = any(copy.request.target.is_cuda for copy in copies or ())
            self._local.buffer = aligned_buffer(chunk_bytes, pin)
        size = stop - start
        filled = self._open[index].read(self._local.buffer[: aligned_up(size)].numpy().data, start)
        buffer: torch.Tensor = self._local.buffer[:size]
        wrong = check and checksum(buffer.numpy().data) != file.checksums[chunk]
        if filled < size or wrong:
            raise CheckpointError(
                f"{self.directory / file.name} is damaged: its bytes {start}-{stop} do not match their checksum"
            )
        for copy in copies or ():
            _copy_out(copy, buffer, start)

    @staticmethod
    def _run(futures: list[Future[None]]) -> None:
        try:
            for future in futures:
                future.result()
        except OSError as error:
            raise CheckpointError(f"the checkpoint cannot be read: {error}") from error
        finally:
            for future in futures:
                future.cancel()


def _copy_out(copy: _Copy, buffer: torch.Tensor, start: int) -> None:
    """Copy what ``buffer``, the file's bytes from ``start`` on, holds of ``copy`` to its place in the target."""
    part, request = copy.part, copy.request
    dtype = DTYPES[request.record.dtype]
    # The flat range of the part that lies in the buffer. Chunks are a multiple of every dtype's width, and parts
    # are aligned, so no element lies across two chunks.
    begin = max(0, start - part.start) // dtype.itemsize
    end = min(part.box.numel, (start + buffer.numel() - part.start) // dtype.itemsize)
    place = part.start + begin * dtype.itemsize - start
    for box in rectangles(part.box.shape, begin, end):
        size = box.numel * dtype.itemsize
        held = box.moved(part.box.offset)
        shared = intersection(held, copy.shared)
        if shared is not None:
            source = buffer[place : place + size].view(dtype).view(box.shape)
            request.target[shared.slices_in(request.box)].copy_(source[shared.slices_in(held)])
        place += size


def _flat_index(index: tuple[int, ...], box: Box) -> int:
    """Row-major place of a global index within ``box``."""
    return sum((i - o) * prod(box.shape[dim + 1 :]) for dim, (i, o) in enumerate(zip(index, box.offset)))
