"""Several datasets as one, in fixed proportions over any part of the run, without an index.

A blend is a binary tree whose leaves are the datasets. At a node of weight ``a + b``, of the first ``n`` samples that
come by ``round(n * a / (a + b))`` go left, so sample ``n`` goes left exactly where that number grows. Following a
sample down the tree gives its dataset and its place among that dataset's samples: a function of the position alone,
exact in integers, with no state and no table, for a run of any length.

Rounding at a node moves a dataset's count by at most half a sample, and each further node scales what came from above
by its child's share. The tree is Huffman's (the heaviest datasets nearest the root), where two nodes down a path at
least halve the weight; so the counts over any prefix differ from ``n * weight`` by less than 2 (by half a sample at
most for two datasets).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

import numpy as np
import numpy.typing as npt

from megatron_ds.data.gpt_dataset import TextSource
from megatron_ds.data.samples import Batch
from megatron_ds.errors import DataError

MAX_TOTAL = 1 << 30
"""Weights are integers with at most this sum; products with a remainder then fit 64 bits."""
TOLERANCE = 0.01
"""How far a weight may be from the one that was asked for, as a part of it."""


@dataclass(frozen=True)
class _Node:
    """``left`` and ``right`` are subtrees, or the number of a dataset."""

    weight: int
    left: _Node | int
    right: _Node | int
    left_weight: int


class BlendSchedule:
    """Which dataset the samples of a blend come from.

    Args:
        weights: positive, in any unit. Taken as the decimal numbers they print as (0.1 is one tenth); if their
            common denominator exceeds 2^30, they are rounded to 2^-30 of the sum.

    Raises:
        DataError: a weight that is not positive, or none, or one so small that rounding would change it by over 1%.
    """

    def __init__(self, weights: Sequence[float]):
        self.weights = _integers(weights)
        self._root = _huffman(self.weights)

    def __call__(self, positions: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(dataset of each position, place among that dataset's samples): int64 of the shape of ``positions``."""
        places = np.asarray(positions, np.int64)
        datasets, indices = np.empty(places.size, np.int64), np.empty(places.size, np.int64)

        def descend(node: _Node | int, where: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> None:
            if not where.size:
                return
            if isinstance(node, int):
                datasets[where], indices[where] = node, places
                return
            before, after = _share(places, node), _share(places + 1, node)
            left = after > before
            descend(node.left, where[left], before[left])
            descend(node.right, where[~left], (places - before)[~left])

        descend(self._root, np.arange(places.size), places.ravel())
        return datasets.reshape(places.shape), indices.reshape(places.shape)

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first ``num_samples`` come from each dataset."""
        found = [0] * len(self.weights)

        def descend(node: _Node | int, count: int) -> None:
            if isinstance(node, int):
                found[node] = count
                return
            left = int(_share(np.array([count]), node)[0])
            descend(node.left, left)
            descend(node.right, count - left)

        descend(self._root, num_samples)
        return found


def _share(counts: npt.NDArray[np.int64], node: _Node) -> npt.NDArray[np.int64]:
    """``round(count * left_weight / weight)``, halves up, in integers that do not overflow below 2^62 samples."""
    whole, rest = np.divmod(counts, node.weight)
    shared: npt.NDArray[np.int64] = whole * node.left_weight + (2 * rest * node.left_weight + node.weight) // (
        2 * node.weight
    )
    return shared


def _integers(weights: Sequence[float]) -> list[int]:
    if not weights or not all(0 < weight < float("inf") for weight in weights):
        raise DataError(f"blend weights {list(weights)} must be positive numbers, one for each dataset")
    exact = [Fraction(str(weight)) for weight in weights]
    denominator = lcm(*(weight.denominator for weight in exact))
    integers = [int(weight * denominator) for weight in exact]
    integers = [weight // gcd(*integers) for weight in integers]
    if (total := sum(integers)) > MAX_TOTAL:
        wanted = [Fraction(weight * (MAX_TOTAL - len(integers)), total) for weight in integers]
        integers = [max(1, round(weight)) for weight in wanted]
        for given, exact_weight, weight in zip(weights, wanted, integers):
            if abs(weight - exact_weight) > TOLERANCE * exact_weight:
                share = float(exact_weight / MAX_TOTAL)
                raise DataError(
                    f"blend weight {given} is {share:.2g} of the sum: in proportion it would be one sample in "
                    f"{1 / share:.2g}, too few to count exactly. Give it at least 5e-8 of the sum, or leave it out"
                )
    return integers


def _huffman(weights: list[int]) -> _Node | int:
    heap: list[tuple[int, int, _Node | int]] = [(weight, i, i) for i, weight in enumerate(weights)]
    heapq.heapify(heap)
    order = len(weights)
    while len(heap) > 1:
        light, _, first = heapq.heappop(heap)
        heavy, _, second = heapq.heappop(heap)
        heapq.heappush(heap, (light + heavy, order, _Node(light + heavy, second, first, heavy)))
        order += 1
    return heap[0][2]


class BlendedDataset:
    """Samples from several sources in the proportions of :class:`BlendSchedule`.

    Each source is read in its own order, epoch after epoch, so its samples do not depend on the others it is blended
    with. Args: ``sources`` with the same ``sequence_length``, ``weights``, one each, by *samples*.
    """

    def __init__(self, sources: Sequence[TextSource], weights: Sequence[float]):
        if len(sources) != len(weights):
            raise DataError(f"{len(sources)} datasets are blended with {len(weights)} weights; give one for each")
        lengths = {source.sequence_length for source in sources}
        if len(lengths) > 1:
            raise DataError(f"blended datasets have different sequence lengths: {sorted(lengths)}")
        self.schedule = BlendSchedule(weights)
        self.sources = list(sources)
        (self.sequence_length,) = lengths

    def __len__(self) -> int:
        """Samples until the first source has been read once (at least 1)."""
        low, high = 1, sum(len(source) for source in self.sources)
        while low < high:
            middle = (low + high + 1) // 2
            if all(count <= len(source) for count, source in zip(self.schedule.counts(middle), self.sources)):
                low = middle
            else:
                high = middle - 1
        return low

    def batch(self, indices: npt.ArrayLike) -> Batch:
        return self._gather(indices, stored=False)

    def rows(self, rows: npt.ArrayLike) -> Batch:
        return self._gather(rows, stored=True)

    def _gather(self, positions: npt.ArrayLike, stored: bool) -> Batch:
        datasets, indices = self.schedule(np.ravel(positions))
        batch: Batch = {}
        for number in np.unique(datasets):
            here = datasets == number
            source = self.sources[number]
            part = source.rows(indices[here]) if stored else source.batch(indices[here])
            for name, array in part.items():
                if name not in batch:
                    batch[name] = np.empty((datasets.size, *array.shape[1:]), array.dtype)
                batch[name][here] = array
        return batch
