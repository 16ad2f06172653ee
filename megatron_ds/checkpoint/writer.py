"""Write a file at the disk's own rate: direct I/O, a few threads, checksums on the way.

The file is cut into chunks of 8 MB. The caller queues spans of tensors, in file order; when a chunk is full, one of
the writer's threads copies its spans into an aligned staging buffer, takes the checksum there and writes it. So
copy, checksum and write of different chunks overlap, and no more than the staging buffers is held beyond the
tensors themselves.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_ds.checkpoint.safetensors_header import Layout
from megatron_ds.files import checksum
from megatron_ds.files.direct_io import DirectFile, aligned_buffer, aligned_up
from megatron_ds.shard.flat_shards import as_bytes

CHUNK_BYTES = 8 << 20
THREADS = 4


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file: ``checksums`` has one entry per ``CHUNK_BYTES`` of the file, header included."""

    name: str
    size: int
    checksums: tuple[str, ...]


class ChunkedWriter:
    """Writes one file of known :class:`Layout`, front to back.

    A full disk is met at construction, when the space is reserved, rather than half-way. Use as a context manager:
    leaving it by an exception closes the file and leaves it to the caller to remove.

    Args:
        path: must not exist.
        layout: header, offsets and size.
        pin: stage in page-locked memory (the sources are on a CUDA device).

    Raises:
        OSError: from the filesystem, at the next :meth:`write` or at :meth:`close`.
    """

    def __init__(self, path: Path, layout: Layout, pin: bool = False, threads: int = THREADS, chunk: int = CHUNK_BYTES):
        self.path, self.size, self.chunk = path, layout.size, chunk
        self._file = DirectFile.create(path, self.size)
        threads = min(threads, -(-self.size // chunk))
        self._staging: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for _ in range(threads):
            self._staging.put(aligned_buffer(min(chunk, aligned_up(self.size)), pin))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="checkpoint-writer")
        # Bounds how far a caller that streams tensors runs ahead, and so how many of them stay alive.
        self._ahead = threading.Semaphore(2 * threads)
        self._futures: list[Future[str]] = []
        self._spans: list[torch.Tensor] = []
        self._filled = self._last = 0
        self._failure: Exception | None = None
        self._queue(torch.frombuffer(bytearray(layout.header), dtype=torch.uint8))

    def write(self, data: torch.Tensor) -> None:
        """Append a contiguous tensor. It must not change until :meth:`close` returns."""
        self._queue(as_bytes(data))

    def release_sources(self) -> None:
        """From now on the tensors written so far may change, or their memory go."""
        self._spans = [span.clone() for span in self._spans]
        for future in self._futures:
            future.result()

    def close(self) -> FileRecord:
        """Write what is left, wait for the disk (fsync), and return the file's size and checksums."""
        if self._spans:
            self._submit()
        checksums = tuple(future.result() for future in self._futures)
        written = (len(checksums) - 1) * self.chunk + self._last
        if written != self.size:
            raise ValueError(f"{self.path.name}: {written} bytes were written, the layout says {self.size}")
        self._pool.shutdown()
        self._file.finish(self.size)
        return FileRecord(self.path.name, self.size, checksums)

    def abort(self) -> None:
        """Stop and close the file, whatever state it is in. Harmless after :meth:`close`."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._file.close()

    def __enter__(self) -> ChunkedWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()

    def _queue(self, data: torch.Tensor) -> None:
        start = 0
        while start < data.numel():
            size = min(self.chunk - self._filled, data.numel() - start)
            self._spans.append(data[start : start + size])
            self._filled += size
            start += size
            if self._filled == self.chunk:
                self._submit()

    def _submit(self) -> None:
        self._ahead.acquire()
        if self._failure is not None:
            raise self._failure
        spans, self._spans = self._spans, []
        self._last, self._filled = self._filled, 0
        self._futures.append(self._pool.submit(self._write_chunk, len(self._futures) * self.chunk, spans))

    def _write_chunk(self, offset: int, spans: list[torch.Tensor]) -> str:
        staging = self._staging.get()
        try:
            filled = 0
            for span in spans:
                target = staging[filled : filled + span.numel()]
                if span.is_cuda:
                    target.copy_(span)
                else:
                    # numpy's copy is one memcpy without the GIL; torch's would start OpenMP threads in each thread.
                    np.copyto(target.numpy(), span.numpy())
                filled += span.numel()
            digest = checksum(staging[:filled].numpy().data)
            padded = aligned_up(filled)
            staging[filled:padded] = 0
            self._file.write(staging[:padded].numpy().data, offset)
            return digest
        except Exception as error:
            self._failure = error
            raise
        finally:
            self._staging.put(staging)
            self._ahead.release()
