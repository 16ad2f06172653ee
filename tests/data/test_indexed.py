"""The `.bin/.idx` layout against an independent reader and writer, and files that are not what they should be."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import indexed_reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.data import verify as verify_module
from megatron_ds.data.dataset_files import file_identity
from megatron_ds.data.indexed import DTYPES, IndexedDataset, dtype_for_vocabulary
from megatron_ds.data.indexed_writer import IndexedDatasetWriter
from megatron_ds.data.verify import check_token_ids, dataset_identity, scan, verify
from megatron_ds.errors import DataError

DOCUMENTS = [[[3, 1, 4], [1, 5]], [[9, 2, 6, 5, 3]], [[5]], [[8, 9, 7, 9]]]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return tmp_path / "set"


def write(prefix: Path, documents: list[list[list[int]]], dtype: np.dtype | str = "uint16") -> None:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(*document)


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_written_files_are_the_layout_byte_for_byte(tmp_path: Path, code: int) -> None:
    write(tmp_path / "ours", DOCUMENTS, DTYPES[code])
    indexed_reference.write(tmp_path / "reference", code, DOCUMENTS)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"reference{suffix}").read_bytes()


@given(
    documents=st.lists(
        st.lists(st.lists(st.integers(0, 65_535), max_size=6), min_size=1, max_size=3), min_size=1, max_size=8
    ).filter(lambda documents: any(s for d in documents for s in d)),
    code=st.sampled_from([4, 5, 8]),
)
@settings(max_examples=60, deadline=None)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], code: int) -> None:
    folder = tmp_path_factory.mktemp("round")
    write(folder / "ours", documents, DTYPES[code])
    assert indexed_reference.read(folder / "ours") == (code, documents)
    indexed_reference.write(folder / "theirs", code, documents)
    ours = IndexedDataset(folder / "theirs")
    ours.check_index()
    assert [ours.document(i).tolist() for i in range(ours.num_documents)] == [
        [t for s in d for t in s] for d in documents
    ]
    assert [ours[i].tolist() for i in range(len(ours))] == [s for d in documents for s in d]
    flat = [t for d in documents for s in d for t in s]
    owner = [i for i, d in enumerate(documents) for s in d for _ in s]
    assert [ours.document_of(t) for t in range(len(flat))] == owner


def test_many_documents_at_once_equal_one_at_a_time(tmp_path: Path) -> None:
    one_at_a_time = [[[1, 2, 3]], [[4]], [[5, 6]]]
    write(tmp_path / "single", one_at_a_time)
    with IndexedDatasetWriter(tmp_path / "batch", "uint16") as writer:
        writer.add_documents(np.arange(1, 5), np.array([3, 1]))
        writer.add_documents(np.arange(5, 7), np.array([2]))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"batch{suffix}").read_bytes() == (tmp_path / f"single{suffix}").read_bytes()


def test_merge_by_copy(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS[:2])
    write(tmp_path / "b", DOCUMENTS[2:])
    with IndexedDatasetWriter(tmp_path / "all", "uint16") as writer:
        for name in ("a", "b"):
            dataset = IndexedDataset(tmp_path / name)
            writer.add_dataset(dataset, verify(dataset))
    assert writer.found == scan(IndexedDataset(tmp_path / "all"))
    assert indexed_reference.read(tmp_path / "all") == (8, DOCUMENTS)
    refused = pytest.raises(DataError, match=r"b\.bin holds uint16 tokens, but .* is int32")
    with refused, IndexedDatasetWriter(tmp_path / "other", "int32") as writer:
        writer.add_dataset(dataset, verify(dataset))
    assert not list(tmp_path.glob("other*"))


def test_a_failed_writer_leaves_nothing(prefix: Path) -> None:
    with pytest.raises(ZeroDivisionError), IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_document([1, 2])
        raise ZeroDivisionError
    assert not list(prefix.parent.iterdir())


def test_lengths_that_would_wrap_around_are_refused(prefix: Path) -> None:
    with (
        pytest.raises(DataError, match=r"a sequence of 2147483648 tokens is longer than an index can say, 2147483647"),
        IndexedDatasetWriter(prefix, "uint8") as writer,
    ):
        writer.add_document(np.broadcast_to(np.uint8(1), 1 << 31))
    assert not list(prefix.parent.iterdir())


@pytest.mark.parametrize("token", [-1, 65_536])
def test_ids_that_would_wrap_around_are_refused(prefix: Path, token: int) -> None:
    refused = pytest.raises(DataError, match=f"token id {token} does not fit uint16")
    with refused, IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_document([1, token])


def test_dtype_follows_the_vocabulary() -> None:
    assert dtype_for_vocabulary(65_499) == np.uint16
    assert dtype_for_vocabulary(65_500) == np.int32


# --- bad files --------------------------------------------------------------------------------------------------


def opened_fails(prefix: Path, message: str) -> None:
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


def test_missing(prefix: Path) -> None:
    opened_fails(prefix, r"set\.idx does not exist\. A dataset is a pair")
    write(prefix, DOCUMENTS)
    prefix.with_suffix(".bin").unlink()
    opened_fails(prefix, r"set\.bin does not exist; set\.idx is there")


@pytest.mark.parametrize("suffix, message", [(".idx", "set.idx is empty: expected at least 34 bytes, found 0"),
                                             (".bin", "set.bin is empty: .* has 30 bytes, found 0")])  # fmt: skip
def test_empty(prefix: Path, suffix: str, message: str) -> None:
    write(prefix, DOCUMENTS)
    prefix.with_suffix(suffix).write_bytes(b"")
    opened_fails(prefix, message)


def test_every_truncation_and_extension_is_named_with_sizes(prefix: Path) -> None:
    write(prefix, DOCUMENTS)
    for suffix in (".bin", ".idx"):
        path = prefix.with_suffix(suffix)
        content = path.read_bytes()
        for wrong in [*(content[:n] for n in range(len(content))), content + b"\0"]:
            path.write_bytes(wrong)
            with pytest.raises(DataError) as error:
                IndexedDataset(prefix)
            assert str(path) in str(error.value) and f"found {len(wrong)}" in str(error.value)
            expected = 34 if suffix == ".idx" and len(wrong) < 34 else len(content)
            assert str(expected) in str(error.value)
        path.write_bytes(content)
    IndexedDataset(prefix)


def test_swapped_partner(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    write(tmp_path / "b", DOCUMENTS[1:])
    (tmp_path / "b.idx").rename(tmp_path / "a.idx")
    opened_fails(tmp_path / "a", "a.bin is longer than its index: a.idx says it has 20 bytes, found 30")


def test_foreign_files(prefix: Path) -> None:
    write(prefix, DOCUMENTS)
    idx = prefix.with_suffix(".idx")
    content = idx.read_bytes()
    idx.write_bytes(b"TNTIDX\0\0\0" + content[9:])
    opened_fails(prefix, "is not a dataset index: it starts with b'TNTIDX")
    idx.write_bytes(content[:9] + struct.pack("<Q", 7) + content[17:])
    opened_fails(prefix, "layout version 7")
    idx.write_bytes(content[:17] + b"\x09" + content[18:])
    opened_fails(prefix, "dtype code 9")


def test_an_empty_dataset(prefix: Path) -> None:
    write(prefix, [])
    opened_fails(prefix, "the dataset is empty")


def test_every_flipped_byte_of_the_index_is_found(prefix: Path) -> None:
    """At opening or by :func:`verify`: an index has redundancy everywhere but in the middle document bounds."""
    write(prefix, [[[i, i + 1]] for i in range(20)])
    path = prefix.with_suffix(".idx")
    content = path.read_bytes()
    silent = []
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
        try:
            IndexedDataset(prefix).check_index()
        except DataError as error:
            assert "set." in str(error)
        else:
            silent.append(at)
    assert silent == []


def test_mutated_tokens_are_found_through_the_manifest(tmp_path: Path) -> None:
    """A dataset of the preprocessing tool: random flips anywhere in either file are named; nothing is silent."""
    from megatron_ds.data.preprocess import PreprocessOptions, preprocess

    source, prefix = tmp_path / "in.txt", tmp_path / "set"
    source.write_text("\n".join(f"line {i} of a text" for i in range(200)))
    preprocess([str(source)], prefix, PreprocessOptions("bytes"), workers=0)
    verify(IndexedDataset(prefix))
    draw = random.Random(0)
    for suffix in (".bin", ".idx"):
        path = prefix.with_suffix(suffix)
        content = bytearray(path.read_bytes())
        for _ in range(20):
            at, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
            content[at] ^= bit
            path.write_bytes(content)
            with pytest.raises(DataError, match=r"set\.(bin|idx)"):
                verify(IndexedDataset(prefix))
            content[at] ^= bit
        path.write_bytes(content)
    verify(IndexedDataset(prefix))


# --- ids beyond the vocabulary ----------------------------------------------------------------------------------


def test_id_beyond_the_vocabulary_is_located(prefix: Path) -> None:
    write(prefix, DOCUMENTS)
    dataset = IndexedDataset(prefix)
    assert check_token_ids(dataset, 10).max_id == 9
    with pytest.raises(DataError, match=r"token id 9 at token 5 \(document 1, place 0\).* has 9 entries, 0 to 8"):
        check_token_ids(dataset, 9)


def test_negative_id_is_located(prefix: Path) -> None:
    write(prefix, [[[1, 2]], [[3, -7]]], "int32")
    with pytest.raises(DataError, match=r"token id -7 at token 3 \(document 1, place 1\)"):
        check_token_ids(IndexedDataset(prefix), 10)


def test_floats_are_not_ids(prefix: Path) -> None:
    write(prefix, DOCUMENTS, "float32")
    with pytest.raises(DataError, match="float32 values, not token ids"):
        check_token_ids(IndexedDataset(prefix), 10)


def test_the_scan_is_kept_and_noticed_when_stale(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_ds.data import verify as module

    scans = []
    real = module.scan
    monkeypatch.setattr(module, "scan", lambda dataset: scans.append(1) or real(dataset))
    write(prefix, DOCUMENTS)
    for _ in range(3):
        check_token_ids(IndexedDataset(prefix), 10)
    assert len(scans) == 1
    write(prefix, [[[12, *range(14)]]])  # other tokens, same name and size of .bin
    with pytest.raises(DataError, match="token id 12 at token 0"):
        check_token_ids(IndexedDataset(prefix), 10)
    assert len(scans) == 2


def test_a_file_that_is_dated_back_is_another_one_all_the_same(prefix: Path) -> None:
    """Changed where no sample is taken: its inode tells."""
    write(prefix, [[list(range(200))] * 500])
    path, before = prefix.with_suffix(".bin"), dataset_identity(IndexedDataset(prefix))
    status, sampled = path.stat(), file_identity(path)
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_identity(path) == sampled and dataset_identity(IndexedDataset(prefix)) != before


def test_an_index_of_over_a_million_sequences_is_checked_to_its_end(tmp_path: Path) -> None:
    count = (1 << 20) + 3
    with IndexedDatasetWriter(tmp_path / "set", "uint16") as writer:
        writer.add_documents(np.arange(count).astype(np.uint16), np.ones(count, np.int64))
    IndexedDataset(tmp_path / "set").check_index()
    content = bytearray((tmp_path / "set.idx").read_bytes())
    content[34 + 4 * (count - 2)] = 2  # behind the header, the length of the last sequence but one
    (tmp_path / "set.idx").write_bytes(content)
    with pytest.raises(DataError, match=rf"damaged at sequence {count - 1}"):
        IndexedDataset(tmp_path / "set").check_index()


def test_a_dataset_is_read_in_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id that no model has is found in whichever of them it is."""
    with IndexedDatasetWriter(tmp_path / "set", "int32") as writer:
        for document in ([5, 1, 2, 3], [30, 4, 4], [7, -2]):
            writer.add_document(document)
    whole = scan(IndexedDataset(tmp_path / "set"))
    monkeypatch.setattr(verify_module, "READ_BYTES", 12)
    assert scan(IndexedDataset(tmp_path / "set")) == whole and (whole.min_id, whole.max_id) == (-2, 30)
    with pytest.raises(DataError, match=r"token id 30 at token 4 \(document 1, place 0\), and ids from -2 to 30"):
        check_token_ids(IndexedDataset(tmp_path / "set"), 30)
    with pytest.raises(DataError, match=r"token id -2 at token 8 \(document 2, place 1\)"):
        check_token_ids(IndexedDataset(tmp_path / "set"), 31)
