"""Whole datasets into one, by copying their bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_ds.data.indexed import COPY_BYTES, IndexedDataset, idx_path, new_prefix, write_header
from megatron_ds.data.parts import INDEX_CHUNK, finish
from megatron_ds.data.verify import ChunkedHash, Scan, checksum, read_manifest, verify
from megatron_ds.errors import DataError
from megatron_ds.files import sync_and_close, temporary_beside


def merge_datasets(
    prefixes: Sequence[str], output_prefix: str | Path, progress: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """Lay datasets end to end, in the order given; returns the manifest of the result.

    Each is verified while it is copied (against its manifest, where it has one). Memory does not grow with their size.

    Args:
        prefixes: at least one; all of the same dtype and, where their manifests say so, the same tokenizer.
        output_prefix: not one of ``prefixes``.
        progress: called with bytes copied since the last call.

    Raises:
        DataError: datasets that do not belong together, a damaged one, or the output among the inputs.
    """
    output = new_prefix(output_prefix)
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    _check_together(datasets, output)
    manifests = [read_manifest(dataset.prefix) for dataset in datasets]
    scans = [verify(dataset) for dataset in datasets]
    dtype = datasets[0].dtype
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(f"{output}.bin") as temporary_bin, temporary_beside(f"{output}.idx") as temporary_idx:
        whole = _copy_tokens(datasets, scans, temporary_bin, progress)
        _write_index(temporary_idx, datasets, dtype)
        described = whole.describe()
        manifest = {
            "version": 1,
            "merged": [dataset.prefix for dataset in datasets],
            "inputs": [entry for manifest in manifests if manifest for entry in manifest["inputs"]],
            **({"tokenizer": manifests[0]["tokenizer"]} if all(manifests) and manifests[0] else {}),
            "counts": {
                "documents": sum(dataset.num_documents for dataset in datasets),
                "tokens": sum(dataset.num_tokens for dataset in datasets),
                "max_id": max(scan.max_id for scan in scans),
            },
            "dtype": dtype.name,
            "files": {
                "bin": described,
                "idx": {"bytes": temporary_idx.stat().st_size, "xxh3": checksum(temporary_idx)},
            },
        }
        low, high = min(scan.min_id for scan in scans), max(scan.max_id for scan in scans)
        found = Scan(low, high, described["xxh3"], manifest["files"]["idx"]["xxh3"])
        finish(output, temporary_bin, temporary_idx, manifest, found, {"bin": whole.sums()})
    return manifest


def _copy_tokens(
    datasets: list[IndexedDataset], scans: list[Scan], path: Path, progress: Callable[[int], None]
) -> ChunkedHash:
    """Lay the datasets' tokens end to end in a new file, each compared with the checksum of its scan on the way."""
    whole = ChunkedHash()
    with path.open("wb") as target:
        for dataset, scan in zip(datasets, scans):
            digest = xxhash.xxh3_64()
            with dataset.bin_path.open("rb") as source:
                while chunk := source.read(COPY_BYTES):
                    digest.update(chunk)
                    whole.update(chunk)
                    target.write(chunk)
                    progress(len(chunk))
            if digest.hexdigest() != scan.bin_xxh3:
                raise DataError(f"{dataset.bin_path} changed while it was copied; merge again")
        sync_and_close(target)
    return whole


def _check_together(datasets: list[IndexedDataset], output: str) -> None:
    if not datasets:
        raise DataError("no dataset to merge was given")
    first = datasets[0]
    first_made = (read_manifest(first.prefix) or {}).get("tokenizer")
    for dataset in datasets:
        if os.path.realpath(idx_path(output)) == os.path.realpath(dataset.idx_path):
            raise DataError(f"{output} is to be written and is one of the datasets to merge; choose another name")
        if dataset.dtype != first.dtype:
            raise DataError(
                f"{dataset.bin_path} holds {dataset.dtype.name} tokens and {first.bin_path.name} {first.dtype.name}; "
                "datasets can be merged only within one dtype: preprocess them with the same tokenizer"
            )
        made = (read_manifest(dataset.prefix) or {}).get("tokenizer")
        if made and first_made and made["xxh3"] != first_made["xxh3"]:
            raise DataError(
                f"{dataset.prefix} was made with the tokenizer {made['spec']} and {first.prefix} with "
                f"{first_made['spec']}, another one: their ids mean different things"
            )


def _write_index(path: Path, datasets: list[IndexedDataset], dtype: np.dtype) -> None:
    sequences = sum(dataset.num_sequences for dataset in datasets)
    with path.open("wb") as index:
        write_header(index, dtype, sequences, sum(dataset.num_documents for dataset in datasets))
        for dataset in datasets:
            for chunk in _chunks(dataset.lengths):
                index.write(chunk.astype("<i4").tobytes())
        at = 0
        for dataset in datasets:
            for chunk in _chunks(dataset.offsets):
                index.write((chunk + at).astype("<i8").tobytes())
            at += dataset.num_tokens * dtype.itemsize
        index.write(np.zeros(1, "<i8").tobytes())
        at = 0
        for dataset in datasets:
            for chunk in _chunks(dataset.document_bounds[1:]):
                index.write((chunk + at).astype("<i8").tobytes())
            at += dataset.num_sequences
        sync_and_close(index)


def _chunks(array: npt.NDArray) -> list[npt.NDArray]:
    return [array[start : start + INDEX_CHUNK] for start in range(0, array.size, INDEX_CHUNK)]
