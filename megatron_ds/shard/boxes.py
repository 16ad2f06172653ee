"""Boxes in a global tensor: what a flat range of a tensor is made of, and what two parts have in common.

A rank holds a flat row-major range of its tensor-parallel box (ZeRO cuts without regard to rows). A file holds
boxes, because any other mesh can intersect those. The bridge is :func:`rectangles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Box:
    """An axis-aligned box: ``offset`` and ``shape`` per dim, in the coordinates of a global tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index of this box in the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape))

    def moved(self, by: tuple[int, ...]) -> Box:
        return Box(tuple(o + b for o, b in zip(self.offset, by)), self.shape)

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """The index of this box in a tensor that holds ``outer``."""
        starts = [o - b for o, b in zip(self.offset, outer.offset)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.shape))


def intersection(a: Box, b: Box) -> Box | None:
    """What ``a`` and ``b`` share, or None where that is nothing. Two 0-d boxes share their one element."""
    offset = tuple(max(x, y) for x, y in zip(a.offset, b.offset))
    end = [min(x + m, y + n) for x, m, y, n in zip(a.offset, a.shape, b.offset, b.shape)]
    shape = tuple(e - o for o, e in zip(offset, end))
    return Box(offset, shape) if all(size > 0 for size in shape) else None


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The flat row-major range ``[start, stop)`` of a tensor of ``shape`` as boxes, in flat order.

    An n-D range is at most ``2n - 1`` boxes: a partial row at either end (each again a range of one dim fewer,
    open on one side only) around whole rows. Each box is contiguous in flat order, so that the boxes laid end to
    end are the range itself: writing them needs no copy.

    Raises:
        ValueError: the range is not inside the tensor.
    """
    if not 0 <= start <= stop <= prod(shape):
        raise ValueError(f"range [{start}, {stop}) is not inside a tensor of shape {list(shape)}")
    if start == stop:
        return []
    if not shape:
        return [Box((), ())]
    row = prod(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)

    def within(index: int, begin: int, end: int) -> list[Box]:
        return [Box((index, *b.offset), (1, *b.shape)) for b in rectangles(shape[1:], begin, end)]

    if first == last:
        return within(first, head, tail)
    boxes = within(first, head, row) if head else []
    whole = first + bool(head)
    if whole < last:
        boxes.append(Box((whole, *[0] * (len(shape) - 1)), (last - whole, *shape[1:])))
    return boxes + (within(last, 0, tail) if tail else [])


def flat_range(box: Box, shape: tuple[int, ...]) -> tuple[int, int]:
    """The shortest flat row-major range ``[first, stop)`` of a tensor of ``shape`` that holds a box with elements."""
    first = last = 0
    for offset, extent, size in zip(box.offset, box.shape, shape):
        first = first * size + offset
        last = last * size + offset + extent - 1
    return first, last + 1


MOST_CORNERS = 1 << 26
"""Of all boxes of a tensor: 1.5 GB in :func:`corners_cancel` where they cut two dims."""


def tiles(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Whether ``boxes`` cover a tensor of ``shape`` exactly: every element lies in one of them, and in one alone.

    Raises:
        ValueError: there are too many corners to count.
    """
    whole = Box((0,) * len(shape), shape)
    filled = [box for box in boxes if box.numel]
    if not whole.numel or len(filled) <= 1:
        return filled == ([whole] if whole.numel else [])
    offset, extent = (np.array([getattr(box, what) for box in filled], np.int64) for what in ("offset", "shape"))
    return corners_cancel(shape, offset, extent)


def corners_cancel(shape: tuple[int, ...], offset: npt.NDArray[np.int64], extent: npt.NDArray[np.int64]) -> bool:
    """:func:`tiles`, of boxes that have elements, as rows ``[n, dims]``.

    Give each box +1 or -1 at its corners (-1 for an odd number of upper ends). That is the mixed difference of the
    function which is 1 in the box and 0 outside, and a function of finite support follows from its difference: the
    boxes tile the tensor if and only if their corners add up to the tensor's own. Dims that no box cuts drop out.
    """
    cut = [dim for dim, size in enumerate(shape) if (extent[:, dim] != size).any()]
    if (len(offset) + 1) << len(cut) > MOST_CORNERS:
        raise ValueError(f"{len(offset)} boxes that cut {len(cut)} dims")
    low = np.concatenate([np.zeros((1, len(cut)), np.int64), offset[:, cut]])
    high = low + np.concatenate([np.array([shape], np.int64)[:, cut], extent[:, cut]])
    corners, weights = [], []
    for upper in product((False, True), repeat=len(cut)):
        corners.append(np.where(upper, high, low))
        weights.append(np.full(len(low), (-1) ** sum(upper)))
        weights[-1][0] *= -1  # the tensor's own
    places, weight = np.concatenate(corners), np.concatenate(weights)
    order = np.lexsort(places.T) if cut else np.arange(len(places))
    places, weight = places[order], weight[order]
    starts = np.flatnonzero(np.r_[True, (places[1:] != places[:-1]).any(1)])
    return not np.add.reduceat(weight, starts).any()
