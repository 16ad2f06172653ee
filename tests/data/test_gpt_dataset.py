"""Packed samples against a slow version that concatenates everything and slices Python lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.data.gpt_dataset import GPTDataset
from megatron_ds.data.gpt_sources import parse_split, split_documents
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.indexed_writer import IndexedDatasetWriter
from megatron_ds.errors import DataError


def build(folder: Path, lengths: list[int]) -> tuple[IndexedDataset, list[list[int]]]:
    """Documents of the given lengths (0 too) whose tokens are all different."""
    documents, at = [], 0
    with IndexedDatasetWriter(folder / "set", "int32") as writer:
        for length in lengths:
            documents.append(list(range(at, at + length)))
            writer.add_document(documents[-1])
            at += length
    return IndexedDataset(folder / "set"), documents


def slow_rows(documents: list[list[int]], s: int, start: int, stop: int) -> list[dict[str, list[int]]]:
    """Every row, each token tagged with (document, place in it)."""
    tagged = [(token, number) for number in range(start, stop) for token in documents[number]]
    rows = []
    for begin in range(0, len(tagged) - s, s):
        window = tagged[begin : begin + s + 1]
        row: dict[str, list[int]] = {name: [] for name in ("tokens", "labels", "positions", "ids", "same")}
        position = document = 0
        for i in range(s):
            (token, number), (target, target_number) = window[i], window[i + 1]
            if i and number != window[i - 1][1]:
                position, document = 0, document + 1
            row["tokens"].append(token)
            row["labels"].append(target)
            row["positions"].append(position)
            row["ids"].append(document)
            row["same"].append(number == target_number)
            position += 1
        rows.append(row)
    return rows


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=25),
    s=st.integers(1, 9),
    ends=st.tuples(st.integers(0, 24), st.integers(1, 25)),
)
@settings(max_examples=150, deadline=None)
def test_rows_equal_the_slow_version(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], s: int, ends: tuple[int, int]
) -> None:
    if not sum(lengths):
        return
    indexed, documents = build(tmp_path_factory.mktemp("gpt"), lengths)
    start, stop = min(ends[0], len(lengths) - 1), min(max(ends), len(lengths))
    start = min(start, stop - 1)
    expected = slow_rows(documents, s, start, stop)
    if not expected:
        with pytest.raises(DataError, match=f"one sample takes sequence_length \\+ 1 = {s + 1}"):
            GPTDataset(indexed, s, (start, stop))
        return
    plain = GPTDataset(indexed, s, (start, stop))
    assert len(plain) == len(expected)
    everything = GPTDataset(indexed, s, (start, stop), document_masking=True)
    batch, marked = plain.rows(range(len(plain))), everything.rows(range(len(plain)))
    for row, wanted in enumerate(expected):
        assert batch["tokens"][row].tolist() == marked["tokens"][row].tolist() == wanted["tokens"]
        assert batch["labels"][row].tolist() == marked["labels"][row].tolist() == wanted["labels"]
        assert batch["position_ids"][row].tolist() == list(range(s))
        assert batch["loss_mask"][row].all()
        assert marked["position_ids"][row].tolist() == wanted["positions"]
        assert marked["document_ids"][row].tolist() == wanted["ids"]
        assert marked["loss_mask"][row].tolist() == wanted["same"]
    assert "document_ids" not in batch


def test_documents_of_several_sequences_are_one_document(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "set", "uint16") as writer:
        for document in ([[1, 2], [3]], [[4, 5, 6, 7]]):
            writer.add_document(*document)
    dataset = GPTDataset(IndexedDataset(tmp_path / "set"), 6, document_masking=True)
    sample = {name: array[0] for name, array in dataset.rows([0]).items()}
    assert sample["document_ids"].tolist() == [0, 0, 0, 1, 1, 1]
    assert sample["position_ids"].tolist() == [0, 1, 2, 0, 1, 2]


def test_dtypes_and_shapes(tmp_path: Path) -> None:
    indexed, _ = build(tmp_path, [50, 50])
    batch = GPTDataset(indexed, 8, document_masking=True).batch([0, 1, 2])
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "tokens": ((3, 8), np.int64),
        "labels": ((3, 8), np.int64),
        "position_ids": ((3, 8), np.int64),
        "document_ids": ((3, 8), np.int64),
        "loss_mask": ((3, 8), np.bool_),
    }


def test_each_epoch_sees_every_row_once_in_another_order(tmp_path: Path) -> None:
    indexed, _ = build(tmp_path, [101])
    dataset = GPTDataset(indexed, 2, seed=5)
    first, second = (dataset.batch(range(e * 50, (e + 1) * 50))["tokens"] for e in (0, 1))
    assert sorted(first[:, 0]) == sorted(second[:, 0]) == list(range(0, 100, 2))
    assert (first != second).any()
    other = GPTDataset(indexed, 2, seed=6).batch(range(50))["tokens"]
    assert (first != other).any()


def test_too_short_says_the_numbers(tmp_path: Path) -> None:
    indexed, _ = build(tmp_path, [3, 4])
    message = r"has 7 tokens in documents 0 to 2, but one sample takes sequence_length \+ 1 = 8: use .* <= 6"
    with pytest.raises(DataError, match=message):
        GPTDataset(indexed, 7)
    assert len(GPTDataset(indexed, 6)) == 1
    with pytest.raises(DataError, match=r"documents 1 to 3 were asked for, but .* has 0 to 2"):
        GPTDataset(indexed, 2, (1, 3))


# --- splits -----------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 30), min_size=20, max_size=60),
    weights=st.tuples(st.integers(1, 90), st.integers(0, 50), st.integers(0, 50)),
)
@settings(max_examples=100, deadline=None)
def test_splits_cover_all_documents_once_and_keep_their_shares(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], weights: tuple[int, int, int]
) -> None:
    indexed, _ = build(tmp_path_factory.mktemp("split"), lengths)
    split = ",".join(map(str, weights))
    try:
        ranges = split_documents(indexed, split, 1)
    except DataError as error:
        assert "takes sequence_length + 1 = 2 tokens" in str(error)
        return
    covered = [document for r in ranges.values() if r for document in range(*r)]
    assert covered == list(range(len(lengths)))
    for (name, documents), fraction in zip(ranges.items(), parse_split(split)):
        assert (documents is None) == (fraction == 0), name
        if documents is None:
            continue
        # Each of the two cuts is off by at most half a document.
        share, slack = sum(lengths[slice(*documents)]) / sum(lengths), max(lengths) / sum(lengths)
        assert abs(share - fraction) <= slack + 1e-9


def test_documents_of_one_length_split_as_megatron_counts_them(tmp_path: Path) -> None:
    indexed, _ = build(tmp_path, [5] * 1000)
    expected = {"train": (0, 949), "valid": (949, 999), "test": (999, 1000)}
    assert split_documents(indexed, "949,50,1", 4) == expected


def test_a_split_too_small_says_what_would_do(tmp_path: Path) -> None:
    indexed, _ = build(tmp_path, [10] * 100)
    with pytest.raises(DataError) as error:
        split_documents(indexed, "98,2,0", 31)
    text = str(error.value)
    assert "2 documents with 20 tokens" in text and "sequence_length + 1 = 32 tokens" in text
    assert "at least 3.20% of the weight (it has 2.00%)" in text and "sequence_length <= 19" in text
    split_documents(indexed, "96,4,0", 31)
    split_documents(indexed, "98,2,0", 19)
    with pytest.raises(DataError, match="Use sequence_length <= 999, or more data"):
        split_documents(indexed, "1", 2000)


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan", "inf,1"])
def test_nonsense_splits(split: str) -> None:
    with pytest.raises(DataError, match="one to three weights"):
        parse_split(split)


def test_a_test_split_without_a_sample_stops_nothing(tmp_path: Path) -> None:
    """Nothing reads it: a short corpus trains with the default weights. Its documents are not trained on either."""
    with IndexedDatasetWriter(tmp_path / "set", "int32") as writer:
        for _ in range(100):
            writer.add_document(range(10))
    indexed = IndexedDataset(tmp_path / "set")
    assert split_documents(indexed, "969,30,1", 19) == {"train": (0, 97), "valid": (97, 100), "test": None}
    assert split_documents(indexed, "96,3,1", 19) == {"train": (0, 96), "valid": (96, 99), "test": None}
    assert split_documents(indexed, "96,3,1", 9) == {"train": (0, 96), "valid": (96, 99), "test": (99, 100)}
