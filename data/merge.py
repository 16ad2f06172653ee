"""Whole datasets into one, by copying their bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_ds.data.dataset_files import MASK_SUFFIX, file_of, read_manifest
from megatron_ds.data.indexed import IndexedDataset, new_prefix
from megatron_ds.data.indexed_writer import IndexedDatasetWriter
from megatron_ds.data.verify import Scan, verify
from megatron_ds.errors import DataError


def merge_datasets(
    prefixes: Sequence[str], output_prefix: str | Path, progress: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """Lay datasets end to end, in the order given; returns what the manifest says of it.

    Each is verified while it is copied (against its manifest, where it has one). Memory does not grow with their size.

    Args:
        prefixes: at least one; all of the same dtype, all conversations or none, and, where their manifests say so,
            of the same tokenizer.
        output_prefix: not one of ``prefixes``.
        progress: called with bytes copied since the last call.

    Raises:
        DataError: datasets that do not belong together, a damaged one, or the output among the inputs.
    """
    output = new_prefix(output_prefix)
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    manifests = [read_manifest(dataset.prefix) for dataset in datasets]
    _check_together(datasets, manifests, output)
    scans = [verify(dataset) for dataset in datasets]
    masked = _all_masked(datasets, scans)
    made = {
        "version": 1,
        "merged": [dataset.prefix for dataset in datasets],
        "inputs": [entry for manifest in manifests if manifest for entry in manifest["inputs"]],
        **({"tokenizer": manifests[0]["tokenizer"]} if all(manifests) and manifests[0] else {}),
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
    first, first_made = datasets[0], (manifests[0] or {}).get("tokenizer")
    for dataset, manifest in zip(datasets, manifests):
        if os.path.realpath(file_of(output, "idx")) == os.path.realpath(dataset.idx_path):
            raise DataError(f"{output} is to be written and is one of the datasets to merge; choose another name")
        if dataset.dtype != first.dtype:
            raise DataError(
                f"{dataset.bin_path} holds {dataset.dtype.name} tokens and {first.bin_path.name} {first.dtype.name}; "
                "datasets can be merged only within one dtype: preprocess them with the same tokenizer"
            )
        made = (manifest or {}).get("tokenizer")
        if made and first_made and made["xxh3"] != first_made["xxh3"]:
            raise DataError(
                f"{dataset.prefix} was made with the tokenizer {made['spec']} and {first.prefix} with "
                f"{first_made['spec']}, another one: their ids mean different things"
            )


def _all_masked(datasets: list[IndexedDataset], scans: list[Scan]) -> bool:
    """Whether they hold conversations, whose answers alone are learnt."""
    masked = [dataset.prefix for dataset, scan in zip(datasets, scans) if scan.checksums[MASK_SUFFIX]]
    if masked and len(masked) < len(datasets):
        texts = next(dataset.prefix for dataset in datasets if dataset.prefix not in masked)
        raise DataError(f"{masked[0]} holds conversations and {texts} texts; merge each kind by itself, and blend them")
    return bool(masked)
