"""Checksums of a file in chunks, compared before each chunk is first read.

A whole file is read and compared once, when a dataset is first used. What happens to it afterwards (a flipped bit on a
disk, while size and times look the same) is found here: a process hashes each chunk once, 64 KB at a time, so that
reading a row costs some microseconds more until all chunks have been seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_ds.errors import DataError

CHUNK_BYTES = 1 << 16
"""A row reads one or two chunks. Larger ones cost more for each row, smaller ones more memory: this is 0.01%."""
FETCH_BYTES = 16 << 20
"""A chunk of a remote file, fetched at once."""


class ChunkSums:
    """xxh3-64 of each chunk of a stream, the last of which may be shorter."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES):
        self._chunk_bytes = chunk_bytes
        self._open, self._in_chunk = xxhash.xxh3_64(), 0
        self._sums: list[int] = []

    def update(self, content: bytes | memoryview) -> None:
        view = memoryview(content).cast("B")
        while view.nbytes:
            part = view[: self._chunk_bytes - self._in_chunk]
            self._open.update(part)
            self._in_chunk += part.nbytes
            if self._in_chunk == self._chunk_bytes:
                self._end()
            view = view[part.nbytes :]

    def _end(self) -> None:
        self._sums.append(self._open.intdigest())
        self._open, self._in_chunk = xxhash.xxh3_64(), 0

    def finish(self) -> npt.NDArray[np.uint64]:
        """One checksum a chunk. Ends the stream."""
        if self._in_chunk:
            self._end()
        return np.array(self._sums, np.uint64)


class StreamSums:
    """xxh3-64 of a stream, and of its chunks of each of some sizes.

    Attributes:
        bytes: its length so far.
    """

    def __init__(self, *chunk_bytes: int):
        self._whole, self._chunks = xxhash.xxh3_64(), {size: ChunkSums(size) for size in chunk_bytes}
        self.bytes = 0

    def update(self, content: bytes | memoryview) -> None:
        self.bytes += memoryview(content).nbytes
        self._whole.update(content)
        for chunks in self._chunks.values():
            chunks.update(content)

    def hexdigest(self) -> str:
        return self._whole.hexdigest()

    def chunks(self, size: int) -> npt.NDArray[np.uint64]:
        """Of the chunks of that size. Ends the stream."""
        return self._chunks[size].finish()


class CheckedArray:
    """Looks like the array of a whole file where a dataset needs it: ``size``, ``dtype``, an index or a slice.

    Args:
        path: of the file, mapped read-only.
        dtype: of its elements.
        sums: uint64, one a chunk, as :class:`ChunkSums` made them.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike, sums: npt.NDArray[np.uint64], chunk_bytes: int = CHUNK_BYTES):
        self.path, self.dtype = path, np.dtype(dtype)
        # Plain ndarray views: np.memmap's own indexing is several times slower.
        self._content: npt.NDArray[np.uint8] = np.frombuffer(np.memmap(path, np.uint8, "r"), np.uint8)
        self._array: npt.NDArray = self._content.view(self.dtype)
        self._sums, self._chunk_bytes = sums, chunk_bytes
        self._compared = bytearray(sums.size)
        self.size = int(self._array.size)

    def __getitem__(self, where: int | slice) -> Any:
        start, stop, step = where.indices(self.size) if isinstance(where, slice) else (where, where + 1, 1)
        assert step == 1 and start >= 0, "elements are read in runs, from the start on"
        if stop > start:
            first = start * self.dtype.itemsize // self._chunk_bytes
            last = (stop * self.dtype.itemsize - 1) // self._chunk_bytes
            for chunk in range(first, last + 1):
                if not self._compared[chunk]:
                    self._compare(chunk)
                    self._compared[chunk] = 1
        return self._array[where]

    def _chunk(self, chunk: int) -> tuple[int, npt.NDArray[np.uint8]]:
        """Where a chunk starts, and its bytes."""
        start = chunk * self._chunk_bytes
        return start, self._content[start : start + self._chunk_bytes]

    def _compare(self, chunk: int) -> None:
        start, content = self._chunk(chunk)
        found = xxhash.xxh3_64_intdigest(content.data)
        if found != int(self._sums[chunk]):
            raise DataError(
                f"{self.path} is not what it was when it was checked: bytes {start} to {start + content.size} have the "
                f"checksum {found:016x}, not {int(self._sums[chunk]):016x}. It was damaged or changed since: copy it "
                "again, or preprocess again"
            )
