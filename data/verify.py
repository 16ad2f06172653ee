"""Is a dataset what it was when it was written, and does it fit the model?

Both need one pass over the tokens. Its result is kept beside the dataset in ``PREFIX.scan.json``, under the
identity of the two files, so it costs nothing the second time; preprocessing writes it in advance. Checksums of the
chunks that the pass read are kept in ``PREFIX.sums``, and compared when a run first reads each chunk: damage after the
pass does not go unseen either (:mod:`megatron_ds.data.chunk_checks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_ds.data.cache import cached_arrays, cached_json
from megatron_ds.data.chunk_checks import CHUNK_BYTES, ChunkSums
from megatron_ds.data.dataset_files import (
    MASK_SUFFIX,
    READ_BYTES,
    checksum,
    file_identity,
    manifest_path,
    mask_path,
    pieces,
    read_manifest,
)
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.errors import DataError

Sums = dict[str, npt.NDArray[np.uint64]]
"""Checksums of the chunks of each file: ``bin``, and ``loss_mask`` where there is one."""


@dataclass(frozen=True)
class Scan:
    """What one pass over a dataset found: the range of its ids and the checksums (xxh3-64) of its files (an empty one
    for a loss mask that is not there)."""

    min_id: int
    max_id: int
    bin_xxh3: str
    idx_xxh3: str
    mask_xxh3: str = ""


def dataset_identity(dataset: IndexedDataset) -> dict[str, Any]:
    """Identity of its files; with the inode's change time, which no tool sets back."""
    paths = {"bin": dataset.bin_path, "idx": dataset.idx_path, MASK_SUFFIX: mask_path(dataset.prefix)}
    if dataset.remote is not None:
        del paths["bin"]  # the copy grows as it is read, and is compared chunk by chunk
    found = {
        name: {**file_identity(path), "ctime_ns": path.stat().st_ctime_ns}
        for name, path in paths.items()
        if path.is_file()
    }
    return found if dataset.remote is None else {"remote": dataset.remote.identity, "copy": found}


def scan_path(prefix: str) -> Path:
    return Path(f"{prefix}.scan.json")


def sums_path(prefix: str) -> Path:
    return Path(f"{prefix}.sums")


def verify(dataset: IndexedDataset, cache_dir: Path | None = None) -> Scan:
    """Read the dataset once, whole, unless that was done for these very files before; check its reads from then on.

    Raises:
        DataError: the index contradicts itself, or a file is not the one that its manifest describes (a flipped
            bit, a swapped or mutated file); names the file and both checksums.
    """
    read_now: Sums = {}

    def build() -> dict[str, Any]:
        dataset.check_index()
        manifest = read_manifest(dataset.prefix)
        if dataset.remote is not None and dataset.remote.checked and manifest is not None:
            # Each byte of `.bin` was or will be compared on arrival: no need to fetch everything now.
            bin_xxh3, max_id = manifest["files"]["bin"]["xxh3"], manifest["counts"]["max_id"]
            found = Scan(0, max_id, bin_xxh3, dataset.index_checksum(), checksum(mask_path(dataset.prefix)))
        else:
            found, sums = scan(dataset)
            read_now.update(sums)
        if manifest is not None:
            stated = {name: manifest["files"].get(name, {"xxh3": ""})["xxh3"] for name in ("idx", "bin", MASK_SUFFIX)}
            _compare(dataset, found, stated, manifest_path(dataset.prefix).name)
        return asdict(found)

    found = Scan(**cached_json(scan_path(dataset.prefix), dataset_identity(dataset), build, cache_dir))
    if dataset.remote is None:  # a remote dataset's chunks are compared by its own reader
        # Bisection reads the index here and there: it is compared whole, at 200 MB for 10 million documents.
        _compare(dataset, Scan(0, 0, "", dataset.index_checksum()), {"idx": found.idx_xxh3}, scan_path("").name)
        dataset.check_reads(_chunk_sums(dataset, found, read_now, cache_dir))
    return found


def _compare(dataset: IndexedDataset, found: Scan, expected: dict[str, str], where: str) -> None:
    digests = {
        "idx": (dataset.idx_path, found.idx_xxh3),
        "bin": (dataset.bin_path, found.bin_xxh3),
        MASK_SUFFIX: (mask_path(dataset.prefix), found.mask_xxh3),
    }
    for name, digest in expected.items():
        path, is_now = digests[name]
        if is_now != digest:
            raise DataError(
                f"{path} is not the file that was written: its checksum is {is_now}, but {where} says {digest}. It was "
                "damaged, swapped or changed: copy it again, or preprocess again"
            )


def _chunk_sums(dataset: IndexedDataset, found: Scan, read_now: Sums, cache_dir: Path | None) -> Sums:
    """Checksums of the chunks of tokens and mask, of the very content that ``found`` describes."""

    def build() -> Sums:
        if read_now:
            return read_now
        again, sums = scan(dataset)
        stated = {"bin": found.bin_xxh3, MASK_SUFFIX: found.mask_xxh3}
        _compare(dataset, again, stated, scan_path(dataset.prefix).name)
        return sums

    return _kept_sums(dataset.prefix, found, build, cache_dir)


def _kept_sums(prefix: str, found: Scan, build: Callable[[], Sums], cache_dir: Path | None = None) -> Sums:
    key = {"chunk_bytes": CHUNK_BYTES, "bin": found.bin_xxh3, MASK_SUFFIX: found.mask_xxh3}  # wherever it lies
    signed = cached_arrays(
        sums_path(prefix), key, lambda: {name: a.view(np.int64) for name, a in build().items()}, cache_dir
    )
    return {name: array.view(np.uint64) for name, array in signed.items()}


def remember(prefix: str, found: Scan, sums: Sums) -> None:
    """Keep what the maker of a dataset knows of it, so that nobody needs to scan it."""
    cached_json(scan_path(prefix), dataset_identity(IndexedDataset(prefix)), lambda: asdict(found))
    _kept_sums(prefix, found, lambda: sums)


def scan(dataset: IndexedDataset) -> tuple[Scan, Sums]:
    """Read every token (1 to 2 GB/s from memory, the disk's rate otherwise); also the checksums of its chunks."""
    low, high = 0, -1
    digest, sums = xxhash.xxh3_64(), {"bin": ChunkSums()}
    for _, tokens in _runs(dataset):
        digest.update(tokens.data)
        sums["bin"].update(tokens.data)
        low, high = min(low, int(tokens.min())), max(high, int(tokens.max()))
    mask = mask_path(dataset.prefix)
    if mask.is_file():
        sums[MASK_SUFFIX] = ChunkSums()
        for piece in pieces(mask):
            sums[MASK_SUFFIX].update(piece)
    found = Scan(low, high, digest.hexdigest(), dataset.index_checksum(), checksum(mask))
    return found, {name: chunks.finish() for name, chunks in sums.items()}


def _runs(dataset: IndexedDataset) -> Iterator[tuple[int, npt.NDArray]]:
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
    for start, tokens in _runs(dataset):
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
