"""The files of a dataset beside its tokens, and what tells a file from another version or from a damaged copy.

A whole file is read and compared once, when a dataset is first used. What happens to it afterwards (a flipped bit on a
disk, while size and times look the same) is found by a :class:`CheckedArray`: a process hashes each chunk once, 64 KB
at a time, before it is first read, so that reading a row costs some microseconds more until all chunks have been seen.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_ds.errors import DataError, RaisedAs
from megatron_ds.files import read_json

READ_BYTES = 16 << 20
MASK_SUFFIX = "loss_mask"
"""``PREFIX.loss_mask`` holds one byte a token of a dataset of conversations: 1 where it is learnt."""
MANIFEST, SUMS = "manifest.json", "sums"
SAMPLES, SAMPLE_BYTES = 16, 4096
CHUNK_BYTES = 1 << 16
"""A row reads one or two chunks. Larger ones cost more for each row, smaller ones more memory: this is 0.01%."""
FETCH_BYTES = 16 << 20
"""A chunk of a remote file, fetched at once."""


def file_of(prefix: str, suffix: str) -> Path:
    """A file of the dataset at ``prefix``: ``bin``, ``idx``, :data:`MASK_SUFFIX`, :data:`MANIFEST` or :data:`SUMS`."""
    return Path(f"{prefix}.{suffix}")


def read_manifest(prefix: str) -> dict[str, Any] | None:
    """How the dataset was made, if this library made it: inputs, settings, tokenizer, counts, checksums."""
    path = file_of(prefix, MANIFEST)
    if not os.path.lexists(path):
        return None
    try:
        manifest: dict[str, Any] = read_json(path)
        for kind in ("bin", "idx", *(manifest["files"].keys() & {MASK_SUFFIX})):
            _texts(manifest["files"][kind], "xxh3")
        if manifest.get("tokenizer") is not None:
            _texts(manifest["tokenizer"], "spec", "xxh3")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete it to use the dataset without its checksums"
        ) from None
    return manifest


def _texts(values: dict[str, Any], *names: str) -> None:
    wrong = [name for name in names if not isinstance(values[name], str)]
    if wrong:
        raise TypeError(f"{wrong[0]} is {values[wrong[0]]!r}, not a text")


def pieces(path: Path, size: int = READ_BYTES) -> Iterator[bytes]:
    """The content of a file."""
    with path.open("rb") as file:
        while piece := file.read(size):
            yield piece


def file_checksum(path: Path) -> str:
    """xxh3-64 of a file, in hexadecimal; empty where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def require_checksum(what: object, found: str, stated: str, where: str, way_out: str) -> None:
    """A ``DataError`` unless the checksum of ``what`` is the one that is stated ``where``."""
    if found != stated:
        raise DataError(
            f"{what} is not the file that was written: its checksum is {found}, but {where} says {stated}. It was "
            f"damaged, swapped or changed: {way_out}"
        )


def file_identity(path: Path) -> dict[str, Any]:
    """What tells a file from every other version of itself without reading it all: its size, its times of change
    (contents, and inode) and a checksum of 16 pieces spread over it."""
    digest = xxhash.xxh3_64()
    with RaisedAs(DataError, f"{path} cannot be read", OSError):
        status = path.stat()
        with path.open("rb") as file:
            for number in range(SAMPLES):
                file.seek(max(0, (status.st_size - SAMPLE_BYTES) * number // (SAMPLES - 1)))
                digest.update(file.read(SAMPLE_BYTES))
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sampled_xxh3": digest.hexdigest()}


def files_identity(paths: Sequence[Path]) -> dict[str, Any]:
    """The number of files, and a checksum of what :func:`file_identity` says of each: the same for copies of them."""
    digest = xxhash.xxh3_128()
    for path in paths:
        found = file_identity(path)
        digest.update(f"{found['size']} {found['sampled_xxh3']}\n".encode())
    return {"files": len(paths), "xxh3": digest.hexdigest()}


class StreamSums:
    """xxh3-64 of a stream, and of its chunks of each of some sizes, the last of which may be shorter.

    Attributes:
        bytes: its length so far.
    """

    def __init__(self, *chunk_bytes: int):
        self.bytes = 0
        self._whole = xxhash.xxh3_64()
        self._open = {size: xxhash.xxh3_64() for size in chunk_bytes}
        self._ended: dict[int, list[int]] = {size: [] for size in chunk_bytes}

    def update(self, content: bytes | memoryview) -> None:
        view = memoryview(content).cast("B")
        self._whole.update(view)
        end = self.bytes + view.nbytes
        for size, chunk in self._open.items():
            at = self.bytes
            while at < end:
                stop = min(end, at + size - at % size)
                chunk.update(view[at - self.bytes : stop - self.bytes])
                at = stop
                if not at % size:
                    self._ended[size].append(chunk.intdigest())
                    chunk.reset()
        self.bytes = end

    def hexdigest(self) -> str:
        return self._whole.hexdigest()

    def chunks(self, size: int) -> npt.NDArray[np.uint64]:
        """One checksum for each chunk of that size."""
        rest = [self._open[size].intdigest()] if self.bytes % size else []
        return np.array(self._ended[size] + rest, np.uint64)


class CheckedArray:
    """Looks like the array of a whole file where a dataset needs it: ``size``, ``dtype``, an index or a slice.

    Args:
        path: of the file, mapped read-only.
        dtype: of its elements.
        sums: uint64, one a chunk, as :class:`StreamSums` has them.
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
