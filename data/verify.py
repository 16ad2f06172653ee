"""Is a dataset what it was when it was written, and does it fit the model?

Both need one pass over the tokens. Its result is kept beside the dataset in ``PREFIX.scan.json``, under the
identity of the two files, so it costs nothing the second time; preprocessing writes it in advance. Checksums of the
chunks that the pass read are kept in ``PREFIX.sums``, and compared when a run first reads each chunk: damage after the
pass does not go unseen either (:mod:`megatron_ds.data.chunk_checks`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_ds.data import remote
from megatron_ds.data.cache import cached_arrays, cached_json
from megatron_ds.data.chunk_checks import CHUNK_BYTES, ChunkSums
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.errors import DataError
from megatron_ds.files import read_json

SCAN_BYTES = 16 << 20
MASK_SUFFIX = "loss_mask"
"""``PREFIX.loss_mask`` holds one byte a token of a dataset of conversations: 1 where it is learnt."""
SAMPLES, SAMPLE_BYTES = 16, 4096


@dataclass(frozen=True)
class Scan:
    """What one pass over a dataset found: the range of its ids and the checksums (xxh3-64) of its files (an empty one
    for a loss mask that is not there)."""

    min_id: int
    max_id: int
    bin_xxh3: str
    idx_xxh3: str
    mask_xxh3: str = ""


def file_identity(path: Path) -> dict[str, Any]:
    """What tells a file from every other version of itself without reading it all: its size, its times of change
    (contents, and inode) and a checksum of 16 pieces spread over it."""
    digest = xxhash.xxh3_64()
    try:
        status = path.stat()
        with path.open("rb") as file:
            for number in range(SAMPLES):
                file.seek(max(0, (status.st_size - SAMPLE_BYTES) * number // (SAMPLES - 1)))
                digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sampled_xxh3": digest.hexdigest(),
    }


def files_identity(paths: Sequence[Path]) -> dict[str, Any]:
    """The number of files, and a checksum of what :func:`file_identity` says of each: the same for copies of them."""
    digest = xxhash.xxh3_128()
    for path in paths:
        found = file_identity(path)
        digest.update(f"{found['size']} {found['sampled_xxh3']}\n".encode())
    return {"files": len(paths), "xxh3": digest.hexdigest()}


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


def mask_path(prefix: str) -> Path:
    return Path(f"{prefix}.{MASK_SUFFIX}")


def manifest_path(prefix: str) -> Path:
    return Path(f"{prefix}.manifest.json")


def scan_path(prefix: str) -> Path:
    return Path(f"{prefix}.scan.json")


def sums_path(prefix: str) -> Path:
    return Path(f"{prefix}.sums")


def read_manifest(prefix: str) -> dict[str, Any] | None:
    """How the dataset was made, if this library made it: inputs, settings, tokenizer, counts, checksums."""
    path = manifest_path(prefix)
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


def verify(dataset: IndexedDataset, cache_dir: Path | None = None) -> Scan:
    """Read the dataset once, whole, unless that was done for these very files before; check its reads from then on.

    Raises:
        DataError: the index contradicts itself, or a file is not the one that its manifest describes (a flipped
            bit, a swapped or mutated file); names the file and both checksums.
    """
    read_now: dict[str, npt.NDArray[np.uint64]] = {}

    def build() -> dict[str, Any]:
        dataset.check_index()
        manifest = read_manifest(dataset.prefix)
        if dataset.remote is not None and dataset.remote.checked and manifest is not None:
            # Each byte of `.bin` was or will be compared on arrival: no need to fetch everything now.
            bin_xxh3, max_id = manifest["files"]["bin"]["xxh3"], manifest["counts"]["max_id"]
            found = Scan(0, max_id, bin_xxh3, dataset.index_checksum(), _mask_checksum(dataset))
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


def _chunk_sums(
    dataset: IndexedDataset, found: Scan, read_now: dict[str, npt.NDArray[np.uint64]], cache_dir: Path | None
) -> dict[str, npt.NDArray[np.uint64]]:
    """Checksums of the chunks of tokens and mask, of the very content that ``found`` describes."""

    def build() -> dict[str, npt.NDArray]:
        sums = read_now
        if not sums:
            again, sums = scan(dataset)
            stated = {"bin": found.bin_xxh3, MASK_SUFFIX: found.mask_xxh3}
            _compare(dataset, again, stated, scan_path(dataset.prefix).name)
        return as_cached(sums)

    cached = cached_arrays(sums_path(dataset.prefix), sums_key(found), build, cache_dir)
    return {name: sums.view(np.uint64) for name, sums in cached.items()}


def sums_key(found: Scan) -> dict[str, Any]:
    """On what checksums of chunks depend: the content, wherever it lies."""
    return {"chunk_bytes": CHUNK_BYTES, "bin": found.bin_xxh3, MASK_SUFFIX: found.mask_xxh3}


def as_cached(sums: dict[str, npt.NDArray[np.uint64]]) -> dict[str, npt.NDArray]:
    return {name: values.view(np.int64) for name, values in sums.items()}


class ChunkedHash:
    """xxh3-64 of a stream, of its chunks of :data:`~megatron_ds.data.remote.CHUNK_BYTES` for the manifest, and of those
    of :data:`~megatron_ds.data.chunk_checks.CHUNK_BYTES`."""

    def __init__(self) -> None:
        self._whole = xxhash.xxh3_64()
        self._large, self._small = ChunkSums(remote.CHUNK_BYTES), ChunkSums()
        self._bytes = 0

    def update(self, content: bytes | memoryview) -> None:
        self._bytes += len(content)
        for part in (self._whole, self._large, self._small):
            part.update(content)

    def describe(self) -> dict[str, Any]:
        """``bytes``, ``xxh3`` and ``chunks`` for a manifest. Ends the stream."""
        chunks = [f"{digest:016x}" for digest in self._large.finish().tolist()]
        return {"bytes": self._bytes, "xxh3": self._whole.hexdigest(), "chunks": chunks}

    def sums(self) -> npt.NDArray[np.uint64]:
        """Of the small chunks. Ends the stream."""
        return self._small.finish()


def scan(dataset: IndexedDataset) -> tuple[Scan, dict[str, npt.NDArray[np.uint64]]]:
    """Read every token (1 to 2 GB/s from memory, the disk's rate otherwise); also the checksums of its chunks."""
    low, high = 0, -1
    digest, sums = xxhash.xxh3_64(), {"bin": ChunkSums()}
    step = SCAN_BYTES // dataset.dtype.itemsize
    for start in range(0, dataset.num_tokens, step):
        tokens = dataset.tokens[start : start + step]
        digest.update(tokens.data)
        sums["bin"].update(tokens.data)
        chunk_low, chunk_high = int(tokens.min()), int(tokens.max())
        low, high = min(low, chunk_low), max(high, chunk_high)
    mask = ""
    if mask_path(dataset.prefix).is_file():
        sums[MASK_SUFFIX] = ChunkSums()
        mask = checksum(mask_path(dataset.prefix), sums[MASK_SUFFIX])
    found = Scan(low, high, digest.hexdigest(), dataset.index_checksum(), mask)
    return found, {name: chunks.finish() for name, chunks in sums.items()}


def _mask_checksum(dataset: IndexedDataset) -> str:
    mask = mask_path(dataset.prefix)
    return checksum(mask) if mask.is_file() else ""


def checksum(path: Path, chunks: ChunkSums | None = None) -> str:
    """xxh3-64 of a file, in hexadecimal; ``chunks`` is given its content too."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(SCAN_BYTES):
            digest.update(chunk)
            if chunks is not None:
                chunks.update(chunk)
    return digest.hexdigest()


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
    step = SCAN_BYTES // dataset.dtype.itemsize
    for start in range(0, dataset.num_tokens, step):
        tokens = dataset.tokens[start : start + step]
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
