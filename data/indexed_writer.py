"""Writes an indexed dataset (:mod:`megatron_ds.data.indexed`), from tokens or by copying other datasets."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_ds.data import dataset_files
from megatron_ds.data.dataset_files import (
    CHUNK_BYTES,
    MANIFEST,
    MASK_SUFFIX,
    SUMS,
    StreamSums,
    file_of,
    pieces,
    read_manifest,
    require_checksum,
)
from megatron_ds.data.indexed import IndexedDataset, dtype_code, header, new_prefix
from megatron_ds.data.verify import Scan, remember, runs, verify
from megatron_ds.errors import DataError
from megatron_ds.files import replacing, sync_and_close, temporary_beside

INDEX_CHUNK = 1 << 20
COPY_BYTES = 8 << 20
MOST_TOKENS = (1 << 31) - 1
"""Of a sequence: its length is an int32."""


class IndexedDatasetWriter:
    """Writes one dataset; nothing appears under its final name before :meth:`close` has written everything.

    Args:
        prefix: path without suffix; the files of a dataset of this name are replaced.
        dtype: of a token, one of :data:`~megatron_ds.data.indexed.DTYPES`.
        masked: each token comes with one byte of a loss mask.

    Attributes:
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
        self._sums = {kind: StreamSums(dataset_files.FETCH_BYTES, CHUNK_BYTES) for kind in kinds}
        self._sequences = self._documents = 0
        self._low, self._high = 0, -1
        self._closed = False

    def add_document(self, *sequences: npt.ArrayLike) -> None:
        """One document, of one sequence ``[n]`` or more. Ids that do not fit the dtype are refused, and so is a length
        that does not fit the index."""
        for values in map(np.asarray, sequences):
            self._add_lengths(np.array([values.size]))
            self._add_tokens(values)
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
        """All of another dataset, by copying bytes; its files are compared with what was ``found`` of them on the way.

        ``progress``: called with bytes copied since the last call.

        Raises:
            DataError: it has another dtype, or changed.
        """
        _require_dtype(other, self.dtype, f"{self.prefix}.bin")
        _require(other.idx_path, other.index_checksum(), found.checksums["idx"])
        for kind in self._open.keys() - {"idx"}:
            path, digest = file_of(other.prefix, kind), xxhash.xxh3_64()
            # The tokens of a remote one are in its copy once they have been read.
            fetched = other.remote is not None and kind == "bin"
            for piece in (run.view(np.uint8).data for _, run in runs(other)) if fetched else pieces(path, COPY_BYTES):
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
        if lengths.size and not 0 <= int(lengths.min()) <= int(lengths.max()) <= MOST_TOKENS:
            raise DataError(
                f"a sequence of {int(lengths.max())} tokens is longer than an index can say, {MOST_TOKENS}; cut it "
                "into several documents"
            )
        self._lengths.write(lengths.astype("<i4").tobytes())
        self._sequences += lengths.size

    def _add_ends(self, ends: npt.NDArray) -> None:
        self._document_ends.write(ends.astype("<i8").tobytes())
        self._documents += ends.size

    def _write(self, kind: str, content: bytes | memoryview) -> None:
        self._open[kind].write(content)
        self._sums[kind].update(content)

    def close(self, made: Mapping[str, Any] | None = None) -> None:
        """Write the index and move all files to their final names (the index last: with it the dataset exists).

        Args:
            made: how it was made, for the manifest. Its scan is left beside it then too.
        """
        with self._stack:
            self._write_index()
            for file in self._open.values():
                sync_and_close(file)
            checksums = {MASK_SUFFIX: "", **{kind: sums.hexdigest() for kind, sums in self._sums.items()}}
            chunks = {kind: self._sums[kind].chunks(CHUNK_BYTES) for kind in self._sums.keys() - {"idx"}}
            self.found = Scan(int(self._low), int(self._high), checksums, chunks)
            self._publish(stale=() if made is None else (MANIFEST, SUMS))
            self._closed = True
        if made is not None:
            files: dict[str, dict[str, Any]] = {}
            for kind, sums in self._sums.items():
                files[kind] = {"bytes": sums.bytes, "xxh3": sums.hexdigest()}
                if kind in chunks:
                    digests = sums.chunks(dataset_files.FETCH_BYTES).tolist()
                    files[kind]["chunks"] = [f"{digest:016x}" for digest in digests]
            with replacing(file_of(self.prefix, MANIFEST)) as temporary:
                manifest = {**made, "dtype": self.dtype.name, "files": files}
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self._closed:
            self.close()
        self._stack.close()


def _chunks(file: IO[bytes], dtype: str) -> Iterator[npt.NDArray]:
    file.seek(0)
    while content := file.read(INDEX_CHUNK * np.dtype(dtype).itemsize):
        yield np.frombuffer(content, dtype)


def _require(path: Path, digest: str, stated: str) -> None:
    require_checksum(path, digest, stated, "what was found before", "run the same command again")


def _require_dtype(dataset: IndexedDataset, dtype: np.dtype, where: str) -> None:
    if dataset.dtype != dtype:
        raise DataError(
            f"{dataset.bin_path} holds {dataset.dtype.name} tokens, but {where} is {dtype.name}; datasets can be "
            "merged only within one dtype: preprocess them with the same tokenizer"
        )


def _fitting(tokens: npt.NDArray, dtype: np.dtype) -> npt.NDArray:
    """``tokens`` as ``dtype``, refusing ids that would wrap around."""
    if dtype.kind in "iu" and tokens.dtype != dtype:
        low, high, limits = int(tokens.min()), int(tokens.max()), np.iinfo(dtype)
        if low < limits.min or high > limits.max:
            bad = low if low < limits.min else high
            raise DataError(f"token id {bad} does not fit {dtype.name} ({limits.min} to {limits.max})")
    return tokens.astype(dtype, copy=False)


def merge_datasets(
    prefixes: Sequence[str], output_prefix: str | Path, progress: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """Lay whole datasets end to end, in the order given; returns what the manifest says of it.

    Each is verified while it is copied (against its manifest, where it has one). Memory does not grow with their size.

    They must be of one dtype, all conversations or none, and, where their manifests say so, of one tokenizer; the
    output is none of them. ``progress``: called with bytes copied since the last call.

    Raises:
        DataError: datasets that do not belong together, a damaged one, or the output among the inputs.
    """
    output = new_prefix(output_prefix)
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    manifests = [read_manifest(dataset.prefix) for dataset in datasets]
    _check_together(datasets, manifests, output)
    scans = [verify(dataset) for dataset in datasets]
    masked = _all_masked(datasets, scans)
    tokenizers = [(manifest or {}).get("tokenizer") for manifest in manifests]
    made = {
        "version": 1,
        "merged": [dataset.prefix for dataset in datasets],
        "inputs": [entry for manifest in manifests if manifest for entry in manifest["inputs"]],
        **({"tokenizer": tokenizers[0]} if all(tokenizers) else {}),
        "counts": {
            "documents": sum(dataset.num_documents for dataset in datasets),
            "tokens": sum(dataset.num_tokens for dataset in datasets),
            "max_id": max(scan.max_id for scan in scans),
        },
    }
    with IndexedDatasetWriter(output, datasets[0].dtype, masked) as writer:
        for dataset, scan in zip(datasets, scans):
            writer.add_dataset(dataset, scan, progress)
        writer.close(made)
    return made


def _check_together(datasets: list[IndexedDataset], manifests: list[dict[str, Any] | None], output: str) -> None:
    if not datasets:
        raise DataError("no dataset to merge was given")
    first, known = datasets[0], None  # and the first whose tokenizer is known
    for dataset, manifest in zip(datasets, manifests):
        if os.path.realpath(file_of(output, "idx")) == os.path.realpath(dataset.idx_path):
            raise DataError(f"{output} is to be written and is one of the datasets to merge; choose another name")
        _require_dtype(dataset, first.dtype, first.bin_path.name)
        if (made := (manifest or {}).get("tokenizer")) is None:
            continue
        prefix, other = known = known or (dataset.prefix, made)
        if made["xxh3"] != other["xxh3"]:
            raise DataError(
                f"{dataset.prefix} was made with the tokenizer {made['spec']} and {prefix} with {other['spec']}, "
                "another one: their ids mean different things"
            )


def _all_masked(datasets: list[IndexedDataset], scans: list[Scan]) -> bool:
    """Whether they hold conversations, whose answers alone are learnt."""
    masked = [dataset.prefix for dataset, scan in zip(datasets, scans) if scan.checksums[MASK_SUFFIX]]
    if masked and len(masked) < len(datasets):
        texts = next(dataset.prefix for dataset in datasets if dataset.prefix not in masked)
        raise DataError(f"{masked[0]} holds conversations and {texts} texts; merge each kind by itself, and blend them")
    return bool(masked)
