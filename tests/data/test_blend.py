"""Blending: proportions over every prefix, each sample of each dataset once and in order, any chunking."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.data.blend import MAX_TOTAL, BlendedDataset, BlendSchedule, _Node
from megatron_ds.data.gpt_dataset import GPTDataset
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.indexed_writer import IndexedDatasetWriter
from megatron_ds.data.loader import BatchLoader
from megatron_ds.errors import DataError

WEIGHTS = st.lists(
    st.one_of(st.integers(1, 10), st.integers(1, 10**6), st.decimals("0.001", "5", places=3).map(float)),
    min_size=1,
    max_size=12,
)


def deviation_bound(schedule: BlendSchedule) -> list[float]:
    """Per dataset, what ``|count - n * weight|`` never exceeds: half a sample a node, scaled on the way down."""
    bounds = [0.0] * len(schedule.weights)

    def descend(node: _Node | int, bound: float) -> None:
        if isinstance(node, int):
            bounds[node] = bound
            return
        share = node.left_weight / node.weight
        descend(node.left, bound * share + 0.5)
        descend(node.right, bound * (1 - share) + 0.5)

    descend(schedule._root, 0.0)
    return bounds


@given(weights=WEIGHTS, n=st.integers(1, 3000))
@settings(max_examples=150, deadline=None)
def test_every_prefix_has_the_proportions(weights: list[float], n: int) -> None:
    schedule = BlendSchedule(weights)
    datasets, indices = schedule(np.arange(n))
    exact = [Fraction(str(weight)) for weight in weights]
    shares = np.array([float(weight / sum(exact)) for weight in exact])
    counts = np.cumsum(datasets[:, None] == np.arange(len(weights)), axis=0)
    deviation = np.abs(counts - np.arange(1, n + 1)[:, None] * shares).max(axis=0)
    bound = deviation_bound(schedule)
    assert (deviation <= np.array(bound) + 1e-6).all()
    assert max(bound) < 2
    if len(weights) <= 2:
        assert max(bound) <= 0.5
    # Each dataset's samples are taken one after the other.
    assert (indices == counts[np.arange(n), datasets] - 1).all()
    assert schedule.counts(n) == counts[-1].tolist()


@given(weights=WEIGHTS, start=st.integers(0, 2**61), n=st.integers(1, 50))
@settings(max_examples=150, deadline=None)
def test_far_out_it_is_still_exact(weights: list[float], start: int, n: int) -> None:
    schedule = BlendSchedule(weights)
    datasets, indices = schedule(np.arange(start, start + n))
    total = sum(schedule.weights)
    before, after = schedule.counts(start), schedule.counts(start + n)
    for dataset, weight in enumerate(schedule.weights):
        for count, position in ((before[dataset], start), (after[dataset], start + n)):
            assert abs(count - Fraction(position * weight, total)) < 2
        assert indices[datasets == dataset].tolist() == list(range(before[dataset], after[dataset]))


def test_order_of_sources_and_chunks_do_not_matter() -> None:
    schedule = BlendSchedule([0.5, 0.3, 0.15, 0.05])
    whole = schedule(np.arange(1000))
    pieces = [schedule(np.arange(a, b)) for a, b in ((0, 1), (1, 333), (333, 1000))]
    for axis in (0, 1):
        assert (np.concatenate([piece[axis] for piece in pieces]) == whole[axis]).all()
    assert schedule(np.arange(12).reshape(3, 4))[0].tolist() == whole[0][:12].reshape(3, 4).tolist()


def test_weights_are_the_decimals_they_are_written_as() -> None:
    assert BlendSchedule([0.1, 0.2, 0.7]).weights == [1, 2, 7]
    assert BlendSchedule([3e9, 1e9]).weights == [3, 1]
    assert BlendSchedule([0.25]).weights == [1]
    rounded = BlendSchedule([0.123456789123, 0.876543110877, 1e-7]).weights
    assert sum(rounded) <= MAX_TOTAL and abs(rounded[0] / sum(rounded) - 0.123456789) < 2e-9 and rounded[2] == 107


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -2], [float("nan")], [float("inf"), 1]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(DataError, match="must be positive numbers, one for each dataset"):
        BlendSchedule(weights)


@pytest.fixture
def sources(tmp_path: Path) -> list[GPTDataset]:
    found = []
    for number, tokens in enumerate((41, 161, 81)):  # 10, 40 and 20 rows
        with IndexedDatasetWriter(tmp_path / str(number), "int32") as writer:
            writer.add_document(np.arange(tokens) + 1000 * number)
        found.append(GPTDataset(IndexedDataset(tmp_path / str(number)), 4, seed=number))
    return found


def test_samples_are_those_of_the_sources_in_their_own_order(sources: list[GPTDataset]) -> None:
    blend = BlendedDataset(sources, [0.5, 0.2, 0.3])
    with BatchLoader(blend, 10, 5) as loader:
        steps = [next(loader) for _ in range(20)]  # ten epochs of the first
    tokens = np.concatenate([micro["tokens"].numpy() for step in steps for micro in step])
    labels = np.concatenate([micro["labels"].numpy() for step in steps for micro in step])
    assert (labels == tokens + 1).all()
    for number, (source, count) in enumerate(zip(sources, (100, 40, 60))):
        ours = tokens[tokens[:, 0] // 1000 == number]
        assert (ours == source.batch(np.arange(count))["tokens"]).all()


def test_length_and_stored_order_for_evaluation(sources: list[GPTDataset]) -> None:
    blend = BlendedDataset(sources, [1, 1, 2])
    # The first source of 10 rows is read once after about 40 samples, the third of 20 rows too.
    assert len(blend) in range(39, 43)
    assert all(c <= len(s) for c, s in zip(blend.schedule.counts(len(blend)), sources))
    assert any(c > len(s) for c, s in zip(blend.schedule.counts(len(blend) + 1), sources))
    tokens = blend.rows(np.arange(len(blend)))["tokens"]
    for number, source in enumerate(sources):
        ours = tokens[tokens[:, 0] // 1000 == number]
        assert (ours == source.rows(np.arange(len(ours)))["tokens"]).all()


def test_what_does_not_blend(sources: list[GPTDataset]) -> None:
    with pytest.raises(DataError, match="3 datasets are blended with 2 weights"):
        BlendedDataset(sources, [1, 2])
    other = GPTDataset(sources[0].indexed, 5)
    with pytest.raises(DataError, match=r"different sequence lengths: \[4, 5\]"):
        BlendedDataset([sources[0], other], [1, 1])


def test_a_weight_too_small_to_count_is_refused() -> None:
    with pytest.raises(DataError, match=r"blend weight 1e-10 is 1e-10 of the sum: .* Give it at least 5e-8"):
        BlendSchedule([1.0, 1e-10])
    schedule = BlendSchedule([1.0, 6e-8])
    assert schedule.weights[1] / sum(schedule.weights) == pytest.approx(6e-8, rel=0.01)
