"""The sample order: a permutation per epoch, a function of (seed, consumed) alone, and well shuffled."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.data.order import ROUNDS, key, mix, mix_array, order


def slow_order(seed: int, position: int, size: int) -> int:
    """The same network on Python integers, one point at a time, as the module's page describes it."""
    high = next(a for a in range(1, size + 1) if a * a >= size)
    low = -(-size // high)
    epoch, point = divmod(position, size)
    epoch_key = key(seed, epoch)
    while True:
        left, right = divmod(point, low)
        for number in range(ROUNDS):
            round_key = key(epoch_key, number)
            if number % 2:
                right = (right + mix(left ^ round_key)) % low if low > 1 else 0
            else:
                left = (left + mix(right ^ round_key)) % high if high > 1 else 0
        point = left * low + right
        if point < size:
            return point


@given(st.integers(1, 400), st.integers(0, 2**63), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_each_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    rows = order(seed, np.arange(epoch * size, (epoch + 1) * size), size)
    assert sorted(rows.tolist()) == list(range(size))


@given(st.integers(1, 3000), st.integers(-(2**40), 2**64), st.lists(st.integers(0, 10_000), max_size=20))
@settings(max_examples=60, deadline=None)
def test_vectorised_equals_one_at_a_time(size: int, seed: int, positions: list[int]) -> None:
    assert order(seed, positions, size).tolist() == [slow_order(seed, p, size) for p in positions]


def test_mix_array_is_mix() -> None:
    values = [0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF]
    assert mix_array(np.array(values, np.uint64)).tolist() == [mix(v) for v in values]


def test_a_longer_run_has_the_shorter_as_prefix_whatever_the_chunks() -> None:
    whole = order(7, np.arange(1000), 130)
    assert (order(7, np.arange(300), 130) == whole[:300]).all()
    pieces = [order(7, np.arange(a, b), 130) for a, b in ((0, 1), (1, 129), (129, 131), (131, 700), (700, 1000))]
    assert (np.concatenate(pieces) == whole).all()


def test_the_order_never_changes_between_versions() -> None:
    """Runs are resumed years later: these numbers are part of the format."""
    assert order(1234, np.arange(12), 10).tolist() == PINNED_SMALL
    assert order(0, [0, 10**6, 123_456_789, 10**12], 10**9 + 7).tolist() == PINNED_LARGE


PINNED_SMALL = [6, 4, 5, 8, 7, 0, 1, 2, 9, 3, 2, 3]
PINNED_LARGE = [717353105, 142451293, 447760547, 406498338]


def test_seeds_and_epochs_differ() -> None:
    size = 1000
    orders = [order(seed, np.arange(e * size, (e + 1) * size), size) for seed in (0, 1) for e in (0, 1, 2)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 12  # a random pair agrees in 1 place on average


def test_rows_land_everywhere_alike() -> None:
    """Chi-square of (position, row) counts over many epochs, for sizes whose network is as small as can be."""
    for size in (2, 3, 5, 7, 12):
        epochs = 1500
        rows = order(11, np.arange(epochs * size), size).reshape(epochs, size)
        counts = np.stack([np.bincount(rows[:, position], minlength=size) for position in range(size)])
        expected = epochs / size
        chi_square = ((counts - expected) ** 2 / expected).sum()
        freedom = (size - 1) ** 2
        assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 10, (size, chi_square)


def test_neighbours_are_not_neighbours_afterwards() -> None:
    size = 100_000
    rows = order(3, np.arange(size), size)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.015
    assert (np.abs(np.diff(rows)) == 1).sum() < 20
