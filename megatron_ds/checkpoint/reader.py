"""Read a checkpoint: files mapped into memory, and each chunk's checksum taken before its bytes are believed.

Checksums are taken of bytes that a few threads read with ``pread``, not of the mapping: a disk that cannot read
gives an ``OSError`` there, where touching the mapping would kill the process, and the copy that follows finds the
pages in the page cache.
"""

from __future__ import annotations

import mmap
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_ds.checkpoint.boxes import Box, intersection
from megatron_ds.checkpoint.manifest import Part, TensorRecord, check_size, read_manifest, resolve
from megatron_ds.checkpoint.safetensors_header import DTYPES
from megatron_ds.checkpoint.writer import FileRecord, checksum
from megatron_ds.errors import CheckpointError, nearest

THREADS = 4


class MappedFile:
    """One file of a checkpoint: its bytes as a read-only uint8 tensor, and its chunks' checksums on demand.

    Raises:
        CheckpointError: the file is missing or has another size than the manifest says.
    """

    def __init__(self, directory: Path, record: FileRecord, chunk_bytes: int, pool: ThreadPoolExecutor):
        check_size(directory, record)
        self.path, self.record, self._chunk_bytes, self._pool = (
            directory / record.name,
            record,
            chunk_bytes,
            pool,
        )
        self._fd = os.open(self.path, os.O_RDONLY)
        self._map = mmap.mmap(self._fd, record.size, prot=mmap.PROT_READ)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns that the buffer is read-only; it stays so
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._checks: dict[int, Future[None]] = {}

    def view(self, part: Part, dtype: torch.dtype) -> torch.Tensor:
        """The part's tensor as a view of the mapping. Never write to it."""
        stop = part.start + part.box.numel * dtype.itemsize
        if not 0 <= part.start <= stop <= self.record.size or part.start % dtype.itemsize:
            raise CheckpointError(f"{self.path}: the manifest puts a tensor at bytes {part.start}-{stop} of it")
        return self._bytes[part.start : stop].view(dtype).view(part.box.shape)

    def start_checks(self, start: int, stop: int) -> list[Future[None]]:
        """Begin to verify the chunks of the byte range, each once; the futures raise what was found."""
        chunks = range(start // self._chunk_bytes, -(-stop // self._chunk_bytes))
        for chunk in chunks:
            if chunk not in self._checks:
                self._checks[chunk] = self._pool.submit(self._check, chunk)
        return [self._checks[chunk] for chunk in chunks]

    def _check(self, chunk: int) -> None:
        start = chunk * self._chunk_bytes
        size = min(self._chunk_bytes, self.record.size - start)
        buffer = _thread_buffer(self._chunk_bytes)[:size]
        filled = 0
        while filled < size:
            got = os.preadv(self._fd, [buffer[filled:]], start + filled)
            if got == 0:
                break
            filled += got
        if filled < size or chunk >= len(self.record.checksums) or checksum(buffer) != self.record.checksums[chunk]:
            raise CheckpointError(f"{self.path} is damaged: bytes {start}-{start + size} do not match their checksum")

    def close(self) -> None:
        os.close(self._fd)  # the mapping lives as long as a view of it does


_local = threading.local()


def _thread_buffer(size: int) -> memoryview:
    buffer = getattr(_local, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _local.buffer = memoryview(bytearray(size))
    return buffer


class Checkpoint:
    """A checkpoint on disk, read one tensor (or one box of a tensor) at a time.

    Args:
        path: a run's checkpoint directory (its latest is meant) or one step's directory.
        verify: take the checksum of every chunk that is read, once.

    Attributes:
        directory: the step's directory. step, world_size: of the save. meta: what ``save`` was given.

    Raises:
        CheckpointError: missing, incomplete or damaged, here or at the read that touches the damage.
    """

    def __init__(self, path: str | Path, verify: bool = True):
        self.directory = resolve(path)
        self.verify = verify
        self.manifest = read_manifest(self.directory)
        self.step, self.world_size, self.meta = (
            self.manifest.step,
            self.manifest.world_size,
            self.manifest.meta,
        )
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-reader")
        self._files: dict[int, MappedFile] = {}

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
        self.fill(record, Box((0,) * len(record.shape), record.shape), whole)
        return whole

    def fill(self, record: TensorRecord, box: Box, target: torch.Tensor) -> None:
        """Copy ``box`` of the tensor into ``target`` (of the box's shape, any dtype and device)."""
        self._wait(self.start_checks(record, box))
        filled = 0
        for part, shared in self._overlaps(record, box):
            source = self._file(part.file).view(part, DTYPES[record.dtype])
            target[shared.slices_in(box)].copy_(source[shared.slices_in(part.box)])
            filled += shared.numel
        if filled != box.numel:
            raise CheckpointError(
                f"{self.directory}: {record.kind} of {record.name} has {filled} of the {box.numel} elements asked for"
            )

    def start_checks(self, record: TensorRecord, box: Box) -> list[Future[None]]:
        """Begin to read and verify what :meth:`fill` will need, in the background."""
        if not self.verify:
            return []
        width = DTYPES[record.dtype].itemsize
        futures = []
        for part, shared in self._overlaps(record, box):
            first, last = (_flat_index(index, part.box) for index in _corners(shared))
            futures += self._file(part.file).start_checks(part.start + first * width, part.start + (last + 1) * width)
        return futures

    def check_everything(self, each: Callable[[int], None] = lambda size: None) -> list[str]:
        """Verify every byte of every file; the list of what is wrong. ``each`` is told the bytes of each file done."""
        problems = []
        for index, record in enumerate(self.manifest.files):
            try:
                self._wait(self._file(index).start_checks(0, record.size))
            except CheckpointError as error:
                problems.append(str(error))
            each(record.size)
        return problems

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _file(self, index: int) -> MappedFile:
        if index not in self._files:
            if not 0 <= index < len(self.manifest.files):
                raise CheckpointError(f"{self.directory}: the manifest refers to file {index}, which it does not list")
            record = self.manifest.files[index]
            self._files[index] = MappedFile(self.directory, record, self.manifest.chunk_bytes, self._pool)
        return self._files[index]

    @staticmethod
    def _overlaps(record: TensorRecord, box: Box) -> Iterator[tuple[Part, Box]]:
        for part in record.parts:
            shared = intersection(part.box, box)
            if shared is not None:
                yield part, shared

    @staticmethod
    def _wait(futures: Iterable[Future[None]]) -> None:
        for future in futures:
            try:
                future.result()
            except OSError as error:
                raise CheckpointError(f"the checkpoint cannot be read: {error}") from error


def _corners(box: Box) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return box.offset, tuple(o + s - 1 for o, s in zip(box.offset, box.shape))


def _flat_index(index: tuple[int, ...], box: Box) -> int:
    """Row-major place of a global index within ``box``."""
    return sum((i - o) * prod(box.shape[dim + 1 :]) for dim, (i, o) in enumerate(zip(index, box.offset)))
