"""Layers per stage: nothing lost, and the cost split as good as trying them all."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.errors import ConfigError
from megatron_ds.pipeline.layer_split import split_layers


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 200), st.integers(1, 64))
def test_count(num_layers: int, num_stages: int) -> None:
    if num_layers < num_stages:
        with pytest.raises(ConfigError, match=f"num_layers={num_layers} cannot fill num_stages={num_stages}"):
            split_layers(num_layers, num_stages)
        return
    split = split_layers(num_layers, num_stages)
    assert len(split) == num_stages and sum(split) == num_layers
    assert max(split) - min(split) <= 1
    if num_layers % num_stages:
        assert split[-1] == min(split)


def test_spare_layers_go_to_the_later_middle() -> None:
    assert split_layers(30, 4) == [7, 8, 8, 7]
    assert split_layers(9, 4) == [2, 2, 3, 2]
    assert split_layers(11, 4) == [3, 3, 3, 2]
    assert split_layers(7, 2) == [4, 3]
    assert split_layers(5, 1) == [5]


def all_splits(num_layers: int, num_stages: int) -> Iterator[list[int]]:
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        bounds = [0, *cuts, num_layers]
        yield [end - begin for begin, end in pairwise(bounds)]


def stage_costs(split: list[int], layers: list[float], first: float, last: float) -> list[float]:
    costs, done = [], 0
    for count in split:
        costs.append(sum(layers[done : done + count]))
        done += count
    costs[0] += first
    costs[-1] += last
    return costs


cost = st.integers(0, 12).map(float)  # whole numbers: sums are exact


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.data(), st.lists(cost, min_size=1, max_size=9), cost, cost)
def test_cost_is_the_best_of_all(data: st.DataObject, layers: list[float], first: float, last: float) -> None:
    num_stages = data.draw(st.integers(1, len(layers)))

    def rank(split: list[int]) -> tuple[float, float]:
        costs = stage_costs(split, layers, first, last)
        return max(costs), sum(c * c for c in costs)

    split = split_layers(len(layers), num_stages, layers, first, last, mode="cost")
    assert rank(split) == min(map(rank, all_splits(len(layers), num_stages)))
    assert len(split) == num_stages and sum(split) == len(layers) and min(split) >= 1


def test_cost_counts_embedding_and_head() -> None:
    assert split_layers(6, 2, last_cost=2.0, mode="cost") == [4, 2]
    assert split_layers(6, 2, first_cost=2.0, mode="cost") == [2, 4]
    both_ends = split_layers(8, 4, 1.0, 1.0, 1.0, mode="cost")
    assert sorted(stage_costs(both_ends, [1.0] * 8, 1.0, 1.0)) == [2, 2, 3, 3]
    assert split_layers(4, 3, [0.1, 0.1, 0.1, 9.0], mode="cost") in ([1, 2, 1], [2, 1, 1])
    assert split_layers(126, 16, 0.1, 0.05, 0.4, mode="cost")[-1] < 8  # inexact costs, a large model


def test_explicit() -> None:
    assert split_layers(6, 2, mode=[4, 2]) == [4, 2]
    assert split_layers(6, 3, mode=(1, 1, 4)) == [1, 1, 4]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ({"mode": [3, 2]}, r"layers_per_stage=\[3, 2\] has 2 stages and sums to 5; .*sum to num_layers=6"),
        ({"mode": [2, 2, 2]}, r"layers_per_stage=\[2, 2, 2\] has 3 stages .*num_stages=2"),
        ({"mode": [6, 0]}, r"layers_per_stage=\[6, 0\] .*each at least 1"),
        ({"mode": []}, r"layers_per_stage=\[\] has 0 stages"),
        ({"mode": "even"}, "split mode 'even' is unknown; use 'count', 'cost' or a list"),
        ({"mode": "cost", "layer_cost": [1.0] * 5}, "layer_cost lists 5 layers of num_layers=6"),
        ({"mode": "cost", "layer_cost": [1.0] * 5 + [-1.0]}, "the cost of layer 5 is -1.0"),
        ({"mode": "cost", "layer_cost": float("nan")}, "the cost of layer 0 is nan"),
        ({"mode": "cost", "last_cost": -2.0}, "last_cost=-2.0; a cost is finite and not negative"),
    ],
)
def test_refused(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        split_layers(6, 2, **arguments)


def test_no_stage() -> None:
    with pytest.raises(ConfigError, match="num_stages=0"):
        split_layers(4, 0)
