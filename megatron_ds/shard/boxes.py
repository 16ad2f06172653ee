"""Boxes in a global tensor: what a flat range of a tensor is made of, and what two parts have in common.

A rank holds a flat row-major range of its tensor-parallel box (ZeRO cuts without regard to rows). A file holds
boxes, because any other mesh can intersect those. The bridge is :func:`rectangles`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod


@dataclass(frozen=True)
class Box:
    """An axis-aligned box: ``offset`` and ``shape`` per dim, in the coordinates of a global tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

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


MOST_CORNERS = 1 << 26
"""Of all boxes of a tensor: a minute of :func:`tiles`."""


def tiles(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Whether ``boxes`` cover a tensor of ``shape`` exactly: every element lies in one of them, and in one alone.

    Give each box +1 or -1 at its corners (-1 for an odd number of upper ends). That is the mixed difference of the
    function which is 1 in the box and 0 outside, and a function of finite support follows from its difference: the
    boxes tile the tensor if and only if their corners add up to the tensor's own. Dims that no box cuts drop out.

    Raises:
        ValueError: there are too many corners to count.
    """
    whole = Box((0,) * len(shape), shape)
    filled = [box for box in boxes if box.numel]
    if not whole.numel or len(filled) <= 1:
        return filled == ([whole] if whole.numel else [])
    cut = [dim for dim in range(len(shape)) if any(box.shape[dim] != shape[dim] for box in filled)]
    if (len(filled) + 1) << len(cut) > MOST_CORNERS:
        raise ValueError(f"{len(filled)} boxes that cut {len(cut)} dims")
    corners: defaultdict[tuple[int, ...], int] = defaultdict(int)
    for box, weight in [(whole, -1), *((box, 1) for box in filled)]:
        ends = [(box.offset[dim], box.offset[dim] + box.shape[dim]) for dim in cut]
        for upper in product((0, 1), repeat=len(cut)):
            corner = tuple(end[side] for end, side in zip(ends, upper))
            corners[corner] += -weight if sum(upper) % 2 else weight
    return not any(corners.values())
