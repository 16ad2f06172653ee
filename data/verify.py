"""Is a dataset what it was when it was written, and does it fit the model?

Both need one pass over the tokens. Its result is kept beside the dataset in ``PREFIX.sums``, under the identity of the
files, so it costs nothing the second time; preprocessing writes it in advance. The checksums of chunks among it are
compared when a run first reads each chunk: damage after the pass does not go unseen either
(:mod:`megatron_ds.data.dataset_files`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ds.data.cache import cached_arrays
from megatron_ds.data.dataset_files import (
    CHUNK_BYTES,
    MANIFEST,
    MASK_SUFFIX,
    READ_BYTES,
    SUMS,
    StreamSums,
    file_checksum,
    file_identity,
    file_of,
    pieces,
    read_manifest,
    require_checksum,
)
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.errors import DataError


@dataclass(frozen=True)
class Scan:
    """What one pass over a dataset found.

    Attributes:
        min_id, max_id: the range of its ids.
        checksums: xxh3-64 of each file as hex digits; empty for a loss mask that is not there.
        chunks: uint64 checksums of the chunks of ``bin``, and of ``loss_mask`` where there is one; empty where a remote
            dataset's reader has its own.
    """

    min_id: int
    max_id: int
    checksums: dict[str, str]
    chunks: dict[str, npt.NDArray] = field(default_factory=dict, compare=False)


def dataset_identity(dataset: IndexedDataset) -> dict[str, Any]:
    """Identity of its files; with the inode's change time, which no tool sets back."""
    # The copy of a remote one's tokens grows as it is read, and is compared chunk by chunk.
    kinds = ("bin", "idx", MASK_SUFFIX) if dataset.remote is None else ("idx", MASK_SUFFIX)
    paths = {kind: file_of(dataset.prefix, kind) for kind in kinds}
    found = {
        name: {**file_identity(path), "ctime_ns": path.stat().st_ctime_ns}
        for name, path in paths.items()
        if path.is_file()
    }
    return found if dataset.remote is None else {"remote": dataset.remote.identity, "copy": found}


def verify(dataset: IndexedDataset, cache_dir: Path | None = None) -> Scan:
    """Read the dataset once, whole, unless that was done for these very files before; check its reads from then on.

    Raises:
        DataError: the index contradicts itself, or a file is not the one that its manifest describes (a flipped
            bit, a swapped or mutated file); names the file and both checksums.
    """
    found = _kept(dataset, lambda: _checked_scan(dataset), cache_dir)
    if dataset.remote is None:  # a remote dataset's chunks are compared by its own reader
        # Bisection reads the index here and there: it is compared whole, at 200 MB for 10 million documents.
        _compare(dataset, {"idx": dataset.index_checksum()}, found.checksums, SUMS)
        dataset.check_reads(found.chunks)
    return found


def _checked_scan(dataset: IndexedDataset) -> Scan:
    dataset.check_index()
    manifest = read_manifest(dataset.prefix)
    if dataset.remote is not None and dataset.remote.chunk_sums and manifest is not None:
        # Each byte of `.bin` was or will be compared on arrival: no need to fetch everything now.
        checksums = {
            "bin": manifest["files"]["bin"]["xxh3"],
            "idx": dataset.index_checksum(),
            MASK_SUFFIX: file_checksum(file_of(dataset.prefix, MASK_SUFFIX)),
        }
        found = Scan(0, manifest["counts"]["max_id"], checksums)
    else:
        found = scan(dataset)
    if manifest is not None:
        stated = {kind: manifest["files"].get(kind, {"xxh3": ""})["xxh3"] for kind in found.checksums}
        _compare(dataset, found.checksums, stated, MANIFEST)
    return found


def _compare(dataset: IndexedDataset, now: dict[str, str], stated: dict[str, str], suffix: str) -> None:
    """``stated``: in the file with the ``suffix``."""
    where, way_out = file_of(dataset.prefix, suffix).name, "copy it again, or preprocess again"
    for kind, digest in now.items():
        require_checksum(file_of(dataset.prefix, kind), digest, stated[kind], where, way_out)


def _kept(dataset: IndexedDataset, build: Callable[[], Scan], cache_dir: Path | None = None) -> Scan:
    def arrays() -> dict[str, npt.NDArray]:
        found = build()
        summary = {"min_id": found.min_id, "max_id": found.max_id, "checksums": found.checksums}
        return {"summary": np.frombuffer(json.dumps(summary).encode(), np.uint8), **found.chunks}

    key = {"chunk_bytes": CHUNK_BYTES, **dataset_identity(dataset)}
    kept = cached_arrays(file_of(dataset.prefix, SUMS), key, arrays, cache_dir)
    return Scan(**json.loads(kept.pop("summary").tobytes()), chunks=kept)


def remember(prefix: str, found: Scan) -> None:
    """Keep what the maker of a dataset knows of it, so that nobody needs to scan it."""
    _kept(IndexedDataset(prefix), lambda: found)


def scan(dataset: IndexedDataset) -> Scan:
    """Read every token."""
    low, high = 0, -1
    sums = {"bin": StreamSums(CHUNK_BYTES)}
    for _, tokens in runs(dataset):
        sums["bin"].update(tokens.data)
        low, high = min(low, int(tokens.min())), max(high, int(tokens.max()))
    mask = file_of(dataset.prefix, MASK_SUFFIX)
    if mask.is_file():
        sums[MASK_SUFFIX] = StreamSums(CHUNK_BYTES)
        for piece in pieces(mask):
            sums[MASK_SUFFIX].update(piece)
    checksums = {kind: stream.hexdigest() for kind, stream in sums.items()}
    chunks = {kind: stream.chunks(CHUNK_BYTES) for kind, stream in sums.items()}
    return Scan(low, high, {MASK_SUFFIX: "", **checksums, "idx": dataset.index_checksum()}, chunks)


def runs(dataset: IndexedDataset) -> Iterator[tuple[int, npt.NDArray]]:
    """All tokens, some MB at a time, each run with the place of its first."""
    step = READ_BYTES // dataset.dtype.itemsize
    for start in range(0, dataset.num_tokens, step):
        yield start, dataset.tokens[start : start + step]


def check_token_ids(
    dataset: IndexedDataset, vocab_size: int, what: str = "the model's vocabulary", cache_dir: Path | None = None
) -> Scan:
    """Refuse a dataset with an id that an embedding of ``vocab_size`` rows does not have, before training starts.

    Raises:
        DataError: names the id, the token and document where it is first found, and both sizes.
    """
    if dataset.dtype.kind not in "iu":
        raise DataError(f"{dataset.bin_path} holds {dataset.dtype.name} values, not token ids")
    found = verify(dataset, cache_dir)
    if found.max_id < vocab_size and found.min_id >= 0:
        return found
    for start, tokens in runs(dataset):
        wrong = np.flatnonzero((tokens >= vocab_size) | (tokens < 0))
        if wrong.size:
            at = start + int(wrong[0])
            document = dataset.document_of(at)
            tokenizer = (read_manifest(dataset.prefix) or {}).get("tokenizer")
            made = (
                f" It was made with the tokenizer {tokenizer['spec']} of {tokenizer['vocab_size']} entries."
                if tokenizer
                else ""
            )
            larger = f", or a vocab_size of at least {found.max_id + 1}" if found.min_id >= 0 else ""
            raise DataError(
                f"{dataset.bin_path} has token id {int(dataset.tokens[at])} at token {at} (document {document}, place "
                f"{at - dataset.document_start(document)}), and ids from {found.min_id} to {found.max_id}; {what} has "
                f"{vocab_size} entries, 0 to {vocab_size - 1}.{made} Use the tokenizer that made the data{larger}"
            )
    raise DataError(f"{dataset.bin_path} changed while it was read")
