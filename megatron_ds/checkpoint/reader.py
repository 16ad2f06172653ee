"""Read a checkpoint: chunk by chunk, a few threads, each chunk checked before its bytes are believed.

What is wanted is planned first: which parts of which chunks go to which place. Then every chunk is read once,
checked, and copied from. A chunk's share of an n-D part is a flat range, so it is again a few boxes. Memory beyond
the targets is one chunk a thread.

Files are not mapped into memory: a disk that fails would kill the process instead of raising an error, and checking
the chunks and copying from the mapping cost 0.7-1.2 CPU seconds a GB where this costs 0.25.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ds.checkpoint.directory import find
from megatron_ds.checkpoint.index import Part, TensorRecord
from megatron_ds.checkpoint.manifest import rank_name
from megatron_ds.checkpoint.manifest_file import check_size
from megatron_ds.checkpoint.safetensors_header import DTYPES
from megatron_ds.errors import CheckpointError, nearest
from megatron_ds.files import checksum
from megatron_ds.files.direct_io import ALIGNMENT, DirectFile, aligned_buffer, aligned_up
from megatron_ds.shard.boxes import Box, flat_range, intersection, rectangles

THREADS = 4


@dataclass(frozen=True)
class Request:
    """Copy ``box`` of a tensor into ``target``: of the box's shape, any strides, dtype and device."""

    record: TensorRecord
    box: Box
    target: torch.Tensor


@dataclass(frozen=True)
class _Copy:
    """The bytes ``[first, last)`` of a part's file hold what ``shared`` asks of it (among other elements)."""

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
        share: (this one, of how many): which files to look for now; the others are when they are needed. Of 0: none.

    Attributes:
        directory: the step's directory. step, world_size: of the save. meta: what ``save`` was given.

    Raises:
        CheckpointError: missing, incomplete or damaged, here or at the read that touches the damage.
    """

    def __init__(self, path: str | Path, verify: bool = True, share: tuple[int, int] = (0, 0)):
        self.directory, self.manifest = find(path, share)
        self._index = self.manifest.index
        self.verify = verify
        self.step, self.world_size, self.meta = self.manifest.step, self.manifest.world_size, self.manifest.meta
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-reader")
        self._local = threading.local()
        self._open: dict[int, DirectFile] = {}

    def kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for kind, _ in self.manifest.tensors))

    def names(self, kind: str = "param") -> list[str]:
        return [name for of_kind, name in self.manifest.tensors if of_kind == kind]

    def weights_kind(self, average: bool | None = None) -> str:
        """The kind of tensor to use a trained model with: the moving average of the weights, or the weights.

        Args:
            average: the one or the other. Default: the average where there is one.
        """
        there = "ema" in self.kinds()
        if average and not there:
            raise CheckpointError(f"{self.directory} keeps no moving average; train with optimizer.ema_decay")
        return "ema" if (there if average is None else average) else "param"

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
        box = Box((0,) * len(record.shape), record.shape)
        self._index.parts(record, box)  # a shape that no file bears out must not ask for memory
        whole = torch.empty(record.shape, dtype=DTYPES[record.dtype])
        self.fill([Request(record, box, whole)])
        return whole

    def fill(self, requests: Sequence[Request]) -> None:
        """Carry out all requests. After an error some targets may be filled.

        Raises:
            CheckpointError: a chunk that was needed is damaged or cannot be read.
        """
        chunk_bytes = self._index.chunk_bytes
        jobs: dict[tuple[int, int], list[_Copy]] = {}
        parts: set[tuple[TensorRecord, Part]] = set()
        for request in requests:
            for copy in self._copies(request):
                parts.add((request.record, copy.part))
                for chunk in range(copy.first // chunk_bytes, -(-copy.last // chunk_bytes)):
                    jobs.setdefault((copy.part.file, chunk), []).append(copy)
        self._index.check_apart(parts)
        # In file order, so that the disk reads forward.
        self._run([self._submit(file, chunk, jobs[file, chunk]) for file, chunk in sorted(jobs)])

    def check_everything(
        self, each: Callable[[int], None] = lambda size: None, share: tuple[int, int] = (0, 1)
    ) -> list[str]:
        """Read and check every byte; the list of what is wrong.

        Args:
            each: told the bytes of each file done.
            share: (this one, of how many): only these files. The first share's caller checks the index as well.
        """
        problems: list[str] = []
        try:
            if share[0] == 0:
                self._index.check(self.manifest.tensors.values())
        except CheckpointError as wrong:
            problems.append(str(wrong))
        for number in range(share[0], self._index.sizes.files, share[1]):
            try:
                size = self._index.file_size(number)
                self._file(number)
                futures = [self._submit(number, chunk, None) for chunk in range(-(-size // self._index.chunk_bytes))]
                problems += [str(error) for future in futures if (error := future.exception()) is not None]
                each(size)
            except CheckpointError as wrong:
                problems.append(str(wrong))
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
        if any(o + s > size for o, s, size in zip(box.offset, box.shape, record.shape)):
            raise ValueError(f"{record}: {box} is not inside its shape {list(record.shape)}")
        copies = []
        for part, shared in self._index.parts(record, box):
            self._file(part.file)
            begin, end = flat_range(shared.moved(tuple(-o for o in part.box.offset)), part.box.shape)
            copies.append(
                _Copy(request, part, shared, part.start + begin * record.width, part.start + end * record.width)
            )
        return copies

    def _file(self, number: int) -> DirectFile:
        """The open file, its size checked."""
        if number not in self._open:
            path = self.directory / rank_name(number)
            check_size(path, self._index.file_size(number))
            self._open[number] = DirectFile.open(path)
        return self._open[number]

    def _submit(self, file: int, chunk: int, copies: list[_Copy] | None) -> Future[None]:
        start = chunk * self._index.chunk_bytes
        stop = min(start + self._index.chunk_bytes, self._index.file_size(file))
        digest = None
        if self.verify or copies is None:
            digest = self._index.checksum(file, chunk)
        else:
            start = max(start, min(copy.first for copy in copies) // ALIGNMENT * ALIGNMENT)
            stop = min(stop, max(copy.last for copy in copies))
        return self._pool.submit(self._read, self._open[file], start, stop, digest, copies or [])

    def _read(self, file: DirectFile, start: int, stop: int, digest: str | None, copies: list[_Copy]) -> None:
        """Read a chunk, or the needed bytes of it, compare it with its checksum, and copy out of it."""
        if not hasattr(self._local, "buffer"):
            pin = any(copy.request.target.is_cuda for copy in copies)
            self._local.buffer = aligned_buffer(self._index.chunk_bytes, pin)
        size = stop - start
        filled = file.read(self._local.buffer[: aligned_up(size)].numpy().data, start)
        buffer: torch.Tensor = self._local.buffer[:size]
        if filled < size or (digest is not None and checksum(buffer.numpy().data) != digest):
            raise CheckpointError(f"{file.path} is damaged: its bytes {start}-{stop} do not match their checksum")
        for copy in copies:
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
