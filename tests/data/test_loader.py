"""The loader: the same global batches on every mesh, before and after a stop, however they are read."""

from __future__ import annotations

import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ds.data.gpt_dataset import GPTDataset, leave_out
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.indexed_writer import IndexedDatasetWriter
from megatron_ds.data.loader import BatchLoader, MicroBatch, evaluation_batches
from megatron_ds.data.samples import Batch
from megatron_ds.errors import DataError

SEQUENCE = 4


@pytest.fixture
def dataset(tmp_path: Path) -> GPTDataset:
    with IndexedDatasetWriter(tmp_path / "set", "int32") as writer:
        for start, stop in ((0, 30), (30, 31), (31, 121)):
            writer.add_document(np.arange(start, stop))
    return GPTDataset(IndexedDataset(tmp_path / "set"), SEQUENCE, seed=3, document_masking=True)  # 30 rows


def global_batches(
    dataset: GPTDataset, steps: int, global_batch: int, micro_batch: int, dp_size: int, **options: int
) -> list[dict[str, torch.Tensor]]:
    """Each step's samples of all ranks in the order that the assignment rule gives them: [micro-batch, rank]."""
    ranks = []
    for rank in range(dp_size):
        with BatchLoader(dataset, global_batch, micro_batch, rank, dp_size, **options) as loader:
            ranks.append(list(islice(loader, steps)))
    return [
        {
            name: torch.cat([ranks[r][step][j][name] for j in range(len(ranks[0][step])) for r in range(dp_size)])
            for name in ranks[0][step][0]
        }
        for step in range(steps)
    ]


def assert_equal(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("micro_batch, dp_size", [(1, 1), (12, 1), (1, 2), (3, 4), (2, 3), (1, 12), (2, 6)])
def test_every_mesh_reads_the_same_global_batches(dataset: GPTDataset, micro_batch: int, dp_size: int) -> None:
    reference = global_batches(dataset, 7, 12, 12, 1, prefetch=0)  # 84 samples: almost three epochs
    assert_equal(global_batches(dataset, 7, 12, micro_batch, dp_size), reference)
    for step, batch in enumerate(reference):
        assert batch["sample_index"].tolist() == list(range(step * 12, step * 12 + 12))
        assert torch.equal(batch["tokens"], torch.from_numpy(dataset.batch(batch["sample_index"].numpy())["tokens"]))


def test_a_rank_reads_its_own_samples_alone(dataset: GPTDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = GPTDataset.batch
    monkeypatch.setattr(GPTDataset, "batch", lambda self, places: read.extend(places.tolist()) or real(self, places))
    with BatchLoader(dataset, 12, 2, 1, 3, prefetch=0) as loader:
        seen = [i for step in islice(loader, 2) for m in step for i in m["sample_index"].tolist()]
    assert read == seen == [2, 3, 8, 9, 14, 15, 20, 21]


def test_tensors(dataset: GPTDataset) -> None:
    with BatchLoader(dataset, 4, 2) as loader:
        micro_batches = next(loader)
    assert len(micro_batches) == 2
    for name, tensor in micro_batches[0].items():
        assert tensor.shape == ((2,) if name == "sample_index" else (2, SEQUENCE))
        assert tensor.dtype == (torch.bool if name == "loss_mask" else torch.int64)
        assert tensor.is_contiguous()


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resume_goes_on_where_it_stopped_also_on_another_mesh(dataset: GPTDataset, stop: int) -> None:
    reference = global_batches(dataset, 8, 6, 6, 1)
    with BatchLoader(dataset, 6, 3) as loader:
        list(islice(loader, stop))
        state = loader.state_dict()
    assert state == {"consumed": stop * 6}  # what was only read ahead does not count
    assert_equal(global_batches(dataset, 8 - stop, 6, 1, 3, **state), reference[stop:])
    with BatchLoader(dataset, 6, 6) as loader:
        list(islice(loader, 5))
        loader.load_state_dict(state)
        again = [step[0] for step in islice(loader, 8 - stop)]
    assert_equal(again, reference[stop:])


def test_a_closed_loader_goes_on_where_it_was(dataset: GPTDataset) -> None:
    loader = BatchLoader(dataset, 6, 6)
    seen = []
    for _ in range(4):
        seen += next(loader)[0]["sample_index"].tolist()
        loader.close()
    assert seen == list(range(24))


def ramp(consumed: int) -> int:
    return 4 if consumed < 12 else 8


def test_batch_ramp_up_is_a_function_of_consumed_samples(dataset: GPTDataset) -> None:
    with BatchLoader(dataset, ramp, 2) as loader:
        steps = list(islice(loader, 5))
    assert [len(step) for step in steps] == [2, 2, 2, 4, 4]
    assert [i for step in steps for m in step for i in m["sample_index"].tolist()] == list(range(28))
    with BatchLoader(dataset, ramp, 2, consumed=8) as resumed:
        for ours, theirs in zip(steps[2:], resumed):
            assert_equal(ours, theirs)


@pytest.mark.parametrize("global_batch, message", [(10, "use 8 or 12"), (3, "use 4"), (0, "use 4")])
def test_indivisible_batch(dataset: GPTDataset, global_batch: int, message: str) -> None:
    with pytest.raises(DataError, match=f"micro_batch=2 x dp_size=2 = 4 does not divide it; {message}"):
        BatchLoader(dataset, global_batch, 2, 0, 2)


class Failing:
    sequence_length = SEQUENCE
    most = 4

    def __len__(self) -> int:
        return 100

    def rows(self, rows: object) -> Batch:
        return self.batch(rows)

    def batch(self, indices: object) -> Batch:
        if np.asarray(indices).max() >= self.most:
            raise DataError("a damaged sample")
        return {"tokens": np.zeros((np.size(indices), SEQUENCE), np.int64)}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_in_the_reader_reaches_the_caller_each_time_and_stops_nothing_before(
    monkeypatch: pytest.MonkeyPatch, prefetch: int
) -> None:
    with BatchLoader(Failing(), 2, 2, prefetch=prefetch) as loader:
        assert len(list(islice(loader, 2))) == 2
        for _ in range(2):
            with pytest.raises(DataError, match="a damaged sample"):
                next(loader)
        monkeypatch.setattr(Failing, "most", 6)  # as where it was a filesystem that did not answer for a while
        assert next(loader)[0]["sample_index"].tolist() == [4, 5]


def test_no_more_is_read_ahead_than_asked_for(dataset: GPTDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    real = dataset.batch
    monkeypatch.setattr(dataset, "batch", lambda places: (read.append(places), real(places))[1])
    with BatchLoader(dataset, 2, 2, prefetch=2) as loader:
        for used in (1, 2):
            next(loader)
            time.sleep(0.1)
            assert len(read) == used + 3, "two steps wait, and one is read that will have room"


def test_no_thread_is_left(dataset: GPTDataset) -> None:
    before = threading.active_count()
    with BatchLoader(dataset, 6, 6) as loader:
        next(loader)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


# --- evaluation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch, dp_size", [(1, 1), (2, 2), (4, 3), (32, 1), (1, 7)])
def test_evaluation_counts_each_row_once_on_every_mesh(dataset: GPTDataset, micro_batch: int, dp_size: int) -> None:
    ranks = [list(evaluation_batches(dataset, 10, micro_batch, leave_out, r, dp_size)) for r in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1  # no rank waits for another in a collective
    rows: dict[int, MicroBatch] = {}
    for batch in (b for batches in ranks for b in batches):
        assert batch["tokens"].shape == (micro_batch, SEQUENCE)
        for i, index in enumerate(batch["sample_index"].tolist()):
            counted = dataset.rows([index])["loss_mask"][0] if index >= 0 else np.zeros(SEQUENCE, bool)
            assert np.array_equal(batch["loss_mask"][i], counted)
            if index >= 0:
                assert index not in rows
                rows[index] = {name: tensor[i] for name, tensor in batch.items()}
    assert sorted(rows) == list(range(10))
    for index, row in rows.items():
        assert np.array_equal(row["tokens"], dataset.rows([index])["tokens"][0])


def test_evaluation_of_more_rows_than_there_are(dataset: GPTDataset) -> None:
    batches = list(evaluation_batches(dataset, 10**9, 7, leave_out))
    indices = torch.cat([b["sample_index"] for b in batches])
    assert indices.tolist() == [*range(30), *[-1] * 5]
    assert list(evaluation_batches(dataset, 0, 7, leave_out)) == []
