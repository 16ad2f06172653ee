"""Writes an indexed dataset (:mod:`megatron_ds.data.indexed`), from tokens or from other datasets."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_ds.data import chunk_checks
from megatron_ds.data.chunk_checks import CHUNK_BYTES, StreamSums
from megatron_ds.data.dataset_files import MANIFEST, MASK_SUFFIX, SUMS, file_of, pieces, require_checksum
from megatron_ds.data.indexed import IndexedDataset, dtype_code, header, new_prefix
from megatron_ds.data.verify import Scan, remember
from megatron_ds.errors import DataError
from megatron_ds.files import replacing, sync_and_close, temporary_beside

INDEX_CHUNK = 1 << 20
COPY_BYTES = 8 << 20


class IndexedDatasetWriter:
    """Writes one dataset; nothing appears under its final name before :meth:`close` has written everything.

    Args:
        prefix: path without suffix; the files of a dataset of this name are replaced.
        dtype: of a token, one of :data:`~megatron_ds.data.indexed.DTYPES`.
        masked: each token comes with one byte of a loss mask.

    Attributes:
        files: once it is closed, size and checksums of each file, as a manifest has them.
        found: once it is closed, what a scan would find.

    As a context manager it closes on success and leaves no file behind after an exception. Memory does not grow with
    the number of documents.
    """

    found: Scan

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike, masked: bool = False):
        self.prefix = new_prefix(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        dtype_code(self.dtype)
        folder = Path(self.prefix).parent
        folder.mkdir(parents=True, exist_ok=True)
        kinds = ("bin", "idx", MASK_SUFFIX) if masked else ("bin", "idx")
        with contextlib.ExitStack() as stack:
            self._paths = {kind: stack.enter_context(temporary_beside(f"{self.prefix}.{kind}")) for kind in kinds}
            self._open = {kind: stack.enter_context(path.open("wb")) for kind, path in self._paths.items()}
            # What the index is made of when all is known.
            self._lengths = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            self._document_ends = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            self._stack = stack.pop_all()
        self.files: dict[str, dict[str, Any]] = {}
        self._sums = {kind: StreamSums(chunk_checks.FETCH_BYTES, CHUNK_BYTES) for kind in kinds}
        self._sequences = self._documents = self._ended = 0
        self._low, self._high = 0, -1

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """One document of one sequence. Ids that do not fit the dtype are refused."""
        self.add_sequence(tokens)
        self.end_document()

    def add_sequence(self, tokens: npt.ArrayLike) -> None:
        """One sequence ``[n]``; the document goes on until :meth:`end_document`."""
        values = np.asarray(tokens)
        self._add_tokens(values)
        self._add_lengths(np.array([values.size]))

    def end_document(self) -> None:
        self._add_ends(np.array([self._sequences]))

    def add_documents(
        self, tokens: npt.NDArray, lengths: npt.NDArray, mask: npt.NDArray[np.uint8] | None = None
    ) -> None:
        """Many one-sequence documents at once: ``tokens [sum(lengths)]`` laid end to end, ``lengths [n]``."""
        if int(np.sum(lengths, dtype=np.int64)) != tokens.size:
            raise ValueError(f"lengths sum to {np.sum(lengths)}, but there are {tokens.size} tokens")
        self._add_tokens(tokens)
        if mask is not None:
            self._write(MASK_SUFFIX, mask.tobytes())
        self._add_ends(self._sequences + np.arange(1, lengths.size + 1))
        self._add_lengths(lengths)

    def add_dataset(self, other: IndexedDataset, found: Scan, progress: Callable[[int], None] = lambda _: None) -> None:
        """All of another dataset, by copying bytes.

        Args:
            found: what it is; its files are compared with that on the way.
            progress: called with bytes copied since the last call.

        Raises:
            DataError: it has another dtype, or changed.
        """
        if other.dtype != self.dtype:
            raise DataError(
                f"{other.bin_path} holds {other.dtype.name} tokens, but {self.prefix}.bin is {self.dtype.name}; "
                "datasets can be merged only within one dtype: preprocess them with the same tokenizer"
            )
        _require(other.idx_path, other.index_checksum(), found.checksums["idx"])
        for kind in self._open.keys() - {"idx"}:
            path, digest = file_of(other.prefix, kind), xxhash.xxh3_64()
            for piece in pieces(path, COPY_BYTES):
                digest.update(piece)
                self._write(kind, piece)
                progress(len(piece))
            _require(path, digest.hexdigest(), found.checksums[kind])
        self._low, self._high = min(self._low, found.min_id), max(self._high, found.max_id)
        for start in range(1, other.num_documents + 1, INDEX_CHUNK):
            self._add_ends(np.asarray(other.document_bounds[start : start + INDEX_CHUNK]) + self._sequences)
        for start in range(0, other.num_sequences, INDEX_CHUNK):
            self._add_lengths(np.asarray(other.lengths[start : start + INDEX_CHUNK]))

    def _add_tokens(self, tokens: npt.NDArray) -> None:
        if tokens.size:
            self._write("bin", np.ascontiguousarray(_fitting(tokens, self.dtype)).data)
            self._high = max(self._high, tokens.max())
            if self.dtype.kind != "u":
                self._low = min(self._low, tokens.min())

    def _add_lengths(self, lengths: npt.NDArray) -> None:
        self._lengths.write(lengths.astype("<i4").tobytes())
        self._sequences += lengths.size

    def _add_ends(self, ends: npt.NDArray) -> None:
        self._document_ends.write(ends.astype("<i8").tobytes())
        self._documents += ends.size
        self._ended = int(ends[-1]) if ends.size else self._ended

    def _write(self, kind: str, content: bytes | memoryview) -> None:
        self._open[kind].write(content)
        self._sums[kind].update(content)

    def close(self, made: Mapping[str, Any] | None = None) -> None:
        """Write the index and move all files to their final names (the index last: with it the dataset exists).

        Args:
            made: how it was made, for the manifest. Its scan is left beside it then too.
        """
        if self._ended != self._sequences:
            raise ValueError("the last document was not ended: call end_document() before close()")
        with self._stack:
            self._write_index()
            for file in self._open.values():
                sync_and_close(file)
            self.files = {
                kind: {
                    "bytes": sums.bytes,
                    "xxh3": sums.hexdigest(),
                    "chunks": [f"{digest:016x}" for digest in sums.chunks(chunk_checks.FETCH_BYTES).tolist()],
                }
                for kind, sums in self._sums.items()
            }
            del self.files["idx"]["chunks"]
            checksums = {MASK_SUFFIX: "", **{kind: file["xxh3"] for kind, file in self.files.items()}}
            chunks = {kind: self._sums[kind].chunks(CHUNK_BYTES) for kind in self._sums.keys() - {"idx"}}
            self.found = Scan(int(self._low), int(self._high), checksums, chunks)
            self._publish(stale=() if made is None else (MANIFEST, SUMS))
        if made is not None:
            with replacing(file_of(self.prefix, MANIFEST)) as temporary:
                manifest = {**made, "dtype": self.dtype.name, "files": self.files}
                temporary.write_text(json.dumps(manifest, indent=1) + "\n")
            remember(self.prefix, self.found)

    def _write_index(self) -> None:
        self._write("idx", header(self.dtype, self._sequences, self._documents))
        for lengths in _chunks(self._lengths, "<i4"):
            self._write("idx", lengths.tobytes())
        at = 0
        for lengths in _chunks(self._lengths, "<i4"):
            sizes = lengths.astype("<i8") * self.dtype.itemsize
            ends = at + np.cumsum(sizes)
            self._write("idx", (ends - sizes).tobytes())
            at = int(ends[-1])
        self._write("idx", bytes(8))
        for ends in _chunks(self._document_ends, "<i8"):
            self._write("idx", ends.tobytes())

    def _publish(self, stale: tuple[str, ...]) -> None:
        """Give the complete files their final names; a crash in between leaves no readable dataset."""
        for suffix in (*stale, MASK_SUFFIX, "idx"):  # never an old one beside new tokens
            file_of(self.prefix, suffix).unlink(missing_ok=True)
        for kind in (*(self._paths.keys() - {"idx"}), "idx"):
            self._paths[kind].replace(file_of(self.prefix, kind))

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self.files:
            self.close()
        self._stack.close()


def _chunks(file: IO[bytes], dtype: str) -> Iterator[npt.NDArray]:
    file.seek(0)
    while content := file.read(INDEX_CHUNK * np.dtype(dtype).itemsize):
        yield np.frombuffer(content, dtype)


def _require(path: Path, digest: str, stated: str) -> None:
    require_checksum(path, digest, stated, "what was found before", "run the same command again")


def _fitting(tokens: npt.NDArray, dtype: np.dtype) -> npt.NDArray:
    """``tokens`` as ``dtype``, refusing ids that would wrap around."""
    if dtype.kind in "iu" and tokens.dtype != dtype:
        low, high, limits = int(tokens.min()), int(tokens.max()), np.iinfo(dtype)
        if low < limits.min or high > limits.max:
            bad = low if low < limits.min else high
            raise DataError(f"token id {bad} does not fit {dtype.name} ({limits.min} to {limits.max})")
    return tokens.astype(dtype, copy=False)
