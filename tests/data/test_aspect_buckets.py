"""Buckets of aspect ratios and the order of samples that keeps to them."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ds.data.aspect_buckets import BucketOrder, bucket_rows, make_buckets
from megatron_ds.data.loader import rank_offsets
from megatron_ds.data.order import order
from megatron_ds.errors import DataError

BUCKETS = [np.arange(0, 23), np.arange(23, 60), np.arange(60, 63), np.arange(63, 100)]
"""Of 23, 37, 3 and 37 rows."""


def bucket_of(rows: np.ndarray) -> np.ndarray:
    return np.searchsorted([23, 60, 63], rows, side="right")


def test_buckets_are_few_and_none_is_larger() -> None:
    buckets = make_buckets(1024, 64, 2.0)
    assert (1024, 1024) in buckets and (832, 1216) in buckets and (1216, 832) in buckets
    assert all(h * w <= 1024**2 and h % 64 == w % 64 == 0 and max(h, w) <= 2 * min(h, w) for h, w in buckets)
    assert min(h * w for h, w in buckets) > 0.9 * 1024**2
    assert make_buckets(256, 64, 1.0) == ((256, 256),)
    sizes = np.array([[1000, 1000], [3000, 4000], [4000, 3000], [10, 1000]])
    found = bucket_rows(np.array([5, 6, 7, 8]), sizes, ((64, 64), (56, 72), (72, 56), (32, 128)))
    assert {size: rows.tolist() for size, rows in found.items()} == {
        (64, 64): [5], (56, 72): [6], (72, 56): [7], (32, 128): [8],
    }  # fmt: skip


def test_an_epoch_has_every_block_once_and_each_block_one_bucket() -> None:
    buckets = BucketOrder(7, BUCKETS, 4)
    assert (len(buckets), buckets.left_out, buckets.unused) == (92, 8, [2])
    epochs = [buckets.rows(np.arange(92) + 92 * epoch) for epoch in range(40)]
    for rows in epochs:
        assert len(np.unique(rows)) == 92
        assert (bucket_of(rows).reshape(-1, 4) == bucket_of(rows)[::4, None]).all()
        assert np.bincount(bucket_of(rows), minlength=4).tolist() == [20, 36, 0, 36]
    assert not np.array_equal(epochs[0], epochs[1])
    seen = np.bincount(np.concatenate(epochs), minlength=100)
    assert (seen[:60] > 25).all() and (seen[63:] > 25).all()  # which rows are left out changes
    firsts = np.array([bucket_of(rows[:1])[0] for rows in epochs])
    assert np.bincount(firsts, minlength=4).min() == 0 and np.bincount(firsts, minlength=4)[[0, 1, 3]].min() >= 3


def test_a_longer_run_begins_as_a_shorter_one_and_any_place_is_found_alone() -> None:
    buckets = BucketOrder(7, BUCKETS, 4)
    whole = buckets.rows(np.arange(500))
    assert all(np.array_equal(buckets.rows([place]), whole[place : place + 1]) for place in range(0, 500, 7))
    assert not np.array_equal(whole, BucketOrder(8, BUCKETS, 4).rows(np.arange(500)))
    assert np.array_equal(buckets.stored(np.arange(92)), whole[:92])


@pytest.mark.parametrize(("micro_batch", "block"), [(4, 4), (2, 4), (4, 8)])
def test_every_micro_batch_is_of_one_bucket_on_any_number_of_ranks(micro_batch: int, block: int) -> None:
    buckets = BucketOrder(7, BUCKETS, block)
    for ranks in (1, 2, 3, 4):
        for step in range(20):
            size = 24
            for rank in range(ranks):
                if size % (micro_batch * ranks):
                    continue
                for places in step * size + rank_offsets(size, micro_batch, rank, ranks):
                    assert len(np.unique(bucket_of(buckets.rows(places)))) == 1


def test_one_bucket_alone_keeps_every_image_in_the_usual_order() -> None:
    buckets = BucketOrder(5, [np.arange(10, 40)], 8)
    assert (len(buckets), buckets.left_out, buckets.unused) == (30, 0, [])
    assert np.array_equal(buckets.rows(np.arange(90)), 10 + order(5, np.arange(90), 30))
    assert buckets.stored(np.arange(3)).tolist() == [10, 11, 12]


def test_blocks_that_no_bucket_fills_are_an_error() -> None:
    with pytest.raises(DataError, match=r"none of 4 buckets has the 64 .* the largest has 37: .*smaller data.bucket_"):
        BucketOrder(0, BUCKETS, 64)
