"""The noise law: a sample's random numbers follow from (seed, purpose, index) and from nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from megatron_ds.data import noise
from megatron_ds.data.image_samples import DiffusionSamples, Digits
from megatron_ds.data.loader import BatchLoader

SHAPE = (2, 3, 5)


def test_numbers_do_not_depend_on_what_is_drawn_beside_them() -> None:
    together = noise.normal(1, noise.NOISE, np.arange(40), SHAPE)
    for i in (0, 7, 39):
        assert np.array_equal(together[i], noise.normal(1, noise.NOISE, [i], SHAPE)[0])
    assert np.array_equal(together[::-1], noise.normal(1, noise.NOISE, np.arange(40)[::-1], SHAPE))


def test_no_two_samples_purposes_or_seeds_share_numbers() -> None:
    drawn = [
        noise.uniform(seed, purpose, np.arange(500), 4)
        for seed in (0, 1, 2)
        for purpose in (noise.NOISE, noise.TIME, noise.CONDITION, noise.FLIP)
    ]
    values = np.concatenate([block.ravel() for block in drawn])
    assert len(np.unique(values)) == len(values)
    correlation = np.corrcoef(noise.normal(0, noise.NOISE, np.arange(30), (2000,)))
    assert np.abs(correlation - np.eye(30)).max() < 0.12


def test_the_distributions() -> None:
    normal = noise.normal(3, noise.NOISE, np.arange(200), (501,))
    assert normal.dtype == np.float32 and np.isfinite(normal).all()
    assert stats.kstest(normal.ravel(), "norm").pvalue > 0.01
    assert stats.kstest(normal[:, 0], "norm").pvalue > 0.01  # over samples
    assert stats.kstest(noise.uniform(3, noise.TIME, np.arange(5000))[:, 0], "uniform").pvalue > 0.01


def test_the_numbers_are_the_same_for_ever() -> None:
    want = [[0.7640832673688047, 0.41928800314441866], [-0.31397682, -0.57253307, -1.25492036]]
    got = [noise.uniform(1234, noise.TIME, [0, 1]).ravel(), noise.normal(1234, noise.NOISE, [5], (3,)).ravel()]
    for one, other in zip(got, want):
        assert one.tolist() == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_global_batch_is_the_same_for_every_number_of_ranks(ranks: int) -> None:
    """And every sample of it has noise, a time and a decision of its own."""
    samples = DiffusionSamples(Digits(0, 100), 5, no_class=10, dropout=0.25)

    def global_batch(size: int) -> dict[str, np.ndarray]:
        loaders = [BatchLoader(samples, 16, 2, rank, size, prefetch=0) for rank in range(size)]
        micro = [batch for loader in loaders for batch in next(loader)]
        order = np.argsort(np.concatenate([batch["sample_index"] for batch in micro]))
        return {name: np.concatenate([batch[name] for batch in micro])[order] for name in micro[0]}

    one, many = global_batch(1), global_batch(ranks)
    assert all(np.array_equal(one[name], many[name]) for name in one)
    assert len(np.unique(one["noise"].reshape(16, -1), axis=0)) == len(np.unique(one["time"])) == 16


def test_classes_are_dropped_in_training_and_never_in_evaluation() -> None:
    digits = Digits(0, 1000)
    samples = DiffusionSamples(digits, 5, no_class=10, dropout=0.25)
    seen = samples.batch(np.arange(4000))["labels"]
    assert 0.22 < (seen == 10).mean() < 0.28
    rows = samples.rows(np.arange(1000))
    assert np.array_equal(rows["labels"], digits.load(np.arange(1000), np.arange(1000))["labels"])
    # The noise of an evaluation is the same at each one, and no training sample's.
    assert np.array_equal(rows["noise"], samples.rows(np.arange(1000))["noise"])
    assert not np.array_equal(rows["noise"][:9], samples.batch(np.arange(9))["noise"])
