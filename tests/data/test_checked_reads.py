"""Damage that happens after a dataset was checked: named when a run first reads it, whatever the times say."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatron_ds.data import verify as verify_module
from megatron_ds.data.conversation_dataset import ConversationDataset
from megatron_ds.data.dataset_files import CHUNK_BYTES, CheckedArray, StreamSums
from megatron_ds.data.gpt_dataset import GPTDataset
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.indexed_writer import IndexedDatasetWriter, merge_datasets
from megatron_ds.data.verify import dataset_identity, verify
from megatron_ds.errors import DataError

TOKENS = 5 * CHUNK_BYTES // 2 + 777  # u16: five chunks and a part


@pytest.mark.parametrize("piece", [1, 3, 1 << 30])
def test_sums_are_those_of_each_chunk(piece: int) -> None:
    content = bytes(range(100))
    sums = StreamSums(7, 30)
    for at in range(0, 100, piece):
        sums.update(content[at : at + piece])
    assert (sums.bytes, sums.hexdigest()) == (100, xxhash.xxh3_64_hexdigest(content))
    for size in (7, 30):
        expected = [xxhash.xxh3_64_intdigest(content[at : at + size]) for at in range(0, 100, size)]
        assert sums.chunks(size).tolist() == expected


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    tokens = np.random.default_rng(0).integers(0, 60_000, TOKENS)
    with IndexedDatasetWriter(tmp_path / "set", "uint16") as writer:
        for part in np.array_split(tokens, 50):
            writer.add_document(part)
    (tmp_path / "set.loss_mask").write_bytes(bytes([0, 1]) * (TOKENS // 2) + b"\0" * (TOKENS % 2))
    return tmp_path / "set"


def flip(path: Path, bit: int) -> None:
    """One bit, with size and times as before. (The change time of the inode cannot be set back: see below.)"""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0] ^ (1 << bit % 8)
        file.seek(bit // 8)
        file.write(bytes([byte]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def same_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As damage below the file system leaves it: no time changes, and no sample of the content hits it."""
    known: dict[str, dict[str, object]] = {}
    monkeypatch.setattr(verify_module, "dataset_identity", lambda d: known.setdefault(d.prefix, dataset_identity(d)))


@pytest.mark.usefixtures("same_looks")
@pytest.mark.parametrize("suffix", ["bin", "loss_mask", "idx"])
def test_one_flipped_bit_after_the_first_scan_is_named(prefix: Path, suffix: str) -> None:
    rng = random.Random(suffix)
    path = Path(f"{prefix}.{suffix}")
    for _ in range(8):
        verify(IndexedDataset(prefix))
        bit = rng.randrange(34 * 8, path.stat().st_size * 8)
        flip(path, bit)
        with pytest.raises(DataError, match=rf"set\.{suffix} is (damaged|not (what it was|the file that))"):
            dataset = IndexedDataset(prefix)
            verify(dataset)
            if suffix == "loss_mask":
                samples: GPTDataset | ConversationDataset = ConversationDataset(dataset, 64)
            else:
                samples = GPTDataset(dataset, 64)
            samples.rows(range(len(samples)))
        flip(path, bit)


@pytest.mark.usefixtures("same_looks")
def test_only_what_is_read_is_compared_and_that_once(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify(IndexedDataset(prefix))
    flip(Path(f"{prefix}.bin"), 8 * 3 * CHUNK_BYTES + 5)
    dataset = IndexedDataset(prefix)
    compared = []
    real = CheckedArray._compare
    monkeypatch.setattr(CheckedArray, "_compare", lambda self, chunk: compared.append(chunk) or real(self, chunk))
    verify(dataset)
    per_chunk = CHUNK_BYTES // 2
    for _ in range(2):
        dataset.tokens[per_chunk - 1 : per_chunk + 1]
        dataset.tokens[TOKENS - 1]
    assert compared == [0, 1, 5]
    with pytest.raises(DataError, match=f"bytes {3 * CHUNK_BYTES} to {4 * CHUNK_BYTES} have the checksum"):
        dataset.tokens[2 * per_chunk : 4 * per_chunk]


def test_merging_leaves_sums_that_hold(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(f"{prefix}.loss_mask").unlink()
    merge_datasets([str(prefix)], prefix.parent / "merged")
    monkeypatch.setattr(verify_module, "scan", lambda _: pytest.fail("the maker has left nothing to read"))
    merged = IndexedDataset(prefix.parent / "merged")
    verify(merged)
    assert np.array_equal(merged.tokens[0:TOKENS], np.fromfile(f"{prefix}.bin", np.uint16))
