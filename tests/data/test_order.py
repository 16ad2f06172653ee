"""The sample order: a permutation per epoch, a function of (seed, consumed) alone, and well shuffled."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.data import order as order_module
from megatron_ds.data.order import ROUNDS, SMALL, key, mix, mix_array, order


def slow_order(seed: int, position: int, size: int) -> int:
    """The same network on Python integers, one point at a time, as the module's page describes it."""
    epoch, point = divmod(position, size)
    epoch_key = key(seed, epoch)
    if size <= SMALL:
        return sorted(range(size), key=lambda row: mix(epoch_key ^ mix(row)))[point]
    high = next(a for a in range(1, size + 1) if a * a >= size)
    low = -(-size // high)
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


@given(st.integers(1, 400) | st.integers(SMALL, SMALL + 2000), st.integers(0, 2**63), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_each_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    """Of few rows, and of as many as have a network, whose points beyond the last row walk on."""
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


PINNED_SMALL = [8, 4, 9, 1, 2, 5, 3, 6, 7, 0, 6, 8]
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


def test_all_permutations_of_few_rows_are_alike() -> None:
    """Chi-square over the n! orders, which no count of single rows sees."""
    for size in (2, 3, 4, 5):
        epochs, number = 12_000, math.factorial(size)
        rows = order(5, np.arange(epochs * size), size).reshape(epochs, size)
        counts = np.unique(rows @ size ** np.arange(size), return_counts=True)[1]
        assert counts.size == number
        chi_square = ((counts - epochs / number) ** 2 / (epochs / number)).sum()
        assert chi_square < number - 1 + 5 * np.sqrt(2 * (number - 1)), (size, chi_square)


def test_half_of_the_permutations_are_even() -> None:
    """A network over two odd residues gives none that is odd."""
    for size in (9, 25, 49, 81, 225, 961):
        epochs = 400
        rows = order(3, np.arange(epochs * size), size).reshape(epochs, size)
        even = sum((size - cycles(row)) % 2 == 0 for row in rows.tolist())
        assert abs(even - epochs / 2) < 5 * np.sqrt(epochs / 4), (size, even)


def cycles(permutation: list[int]) -> int:
    left, found = set(range(len(permutation))), 0
    while left:
        at, found = left.pop(), found + 1
        while (at := permutation[at]) in left:
            left.remove(at)
    return found


def test_many_epochs_of_few_rows_are_found_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one by one: 4,096 samples of a one-row dataset are 4,096 epochs."""
    monkeypatch.setattr(order_module, "permute", lambda *_: pytest.fail("an epoch by itself"))
    assert not order(0, np.arange(4096), 1).any()
    assert (order(0, np.arange(1_200_000), 3).reshape(-1, 3).sum(axis=1) == 3).all()


def test_neighbours_are_not_neighbours_afterwards() -> None:
    size = 100_000
    rows = order(3, np.arange(size), size)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.015
    assert (np.abs(np.diff(rows)) == 1).sum() < 20
