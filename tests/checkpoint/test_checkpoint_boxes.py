"""Flat ranges as boxes, against the obvious: index a tensor of its own flat indices."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.shard import ShardedDim, ShardSpec
from megatron_ds.shard.boxes import Box, intersection, rectangles, tiles
from megatron_ds.shard.flat_shards import FlatShard, acquired, share_out

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = draw(SHAPES)
    stop = draw(st.integers(0, prod(shape)))
    return shape, draw(st.integers(0, stop)), stop


@st.composite
def two_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box, Box]:
    shape = draw(SHAPES)

    def box() -> Box:
        offset = tuple(draw(st.integers(0, size)) for size in shape)
        return Box(offset, tuple(draw(st.integers(0, size - o)) for size, o in zip(shape, offset)))

    return shape, box(), box()


@settings(max_examples=300, deadline=None)
@given(ranges())
def test_rectangles_laid_end_to_end_are_the_range(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    flat_index = torch.arange(prod(shape)).reshape(shape)
    boxes = rectangles(shape, start, stop)
    whole = Box((0,) * len(shape), shape)
    got = [flat_index[box.slices_in(whole)].flatten() for box in boxes]
    assert torch.equal(torch.cat(got) if got else torch.empty(0, dtype=torch.int64), torch.arange(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(box.numel > 0 for box in boxes)


@settings(max_examples=300, deadline=None)
@given(two_boxes())
def test_intersection_is_the_elements_that_both_hold(case: tuple[tuple[int, ...], Box, Box]) -> None:
    shape, a, b = case
    whole = Box((0,) * len(shape), shape)
    counts = torch.zeros(shape, dtype=torch.int64)
    for box in (a, b):
        counts[box.slices_in(whole)] += 1
    shared = intersection(a, b)
    want = counts == 2
    got = torch.zeros(shape, dtype=torch.bool)
    if shared is not None:
        got[shared.slices_in(whole)] = True
    assert torch.equal(got, want)
    assert (shared is None) == (not want.any())


def test_a_range_outside_its_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"range \[2, 7\) is not inside a tensor of shape \[2, 3\]"):
        rectangles((2, 3), 2, 7)


class Held:
    """Memory as of a store, in which a flat shard begins somewhere."""

    def __init__(self, values: torch.Tensor):
        self.values = values

    def acquire(self) -> torch.Tensor:
        return self.values

    def release(self, changed: bool) -> None:
        assert not changed


@pytest.mark.parametrize("count", [1, 2, 3, 7, 200])
def test_what_replicas_share_out_is_all_of_it_once_in_near_equal_shares(count: int) -> None:
    spec = ShardSpec("w", (4, 6, 3), (ShardedDim(1, "tp", 1, 2),))
    whole = torch.arange(72.0).reshape(4, 6, 3)
    own = spec.slice_of(whole).flatten()  # of which a slice of a bucket has a part
    held = [
        FlatShard.of(spec, "part", own[5:20].clone(), 5, 20),
        FlatShard.from_holder(spec, "stored", Held(torch.cat([own[:3], own])), 3 + 7, own.dtype, 7, 31),
        FlatShard.of(spec, "param", spec.slice_of(whole).contiguous()),
        FlatShard.whole("empty", "param", torch.empty(0, 5)),
        FlatShard.whole("scalar", "param", torch.tensor(3.0, dtype=torch.float64)),
        FlatShard.of(spec, "exp_avg", spec.slice_of(-whole).contiguous()),
        FlatShard.whole("narrow", "param", torch.arange(17, dtype=torch.bfloat16)),
    ]
    got = {(s.kind, s.name): torch.full(s.global_shape, -99.0, dtype=torch.float64) for s in held}
    shares = [share_out(held, index, count) for index in range(count)]
    for group, memory in (each for share in shares for each in acquired(share)):
        for flat_shard in group:
            into = got[flat_shard.kind, flat_shard.name]
            for box, values in flat_shard.parts(memory):
                assert (into[box.slices] == -99).all()
                into[box.slices] = values.double()
    assert torch.equal(got["param", "w"][:, 3:], whole[:, 3:].double()) and (got["param", "w"][:, :3] == -99).all()
    assert torch.equal(got["exp_avg", "w"][:, 3:], -whole[:, 3:].double())
    for kind, start, stop in (("part", 5, 20), ("stored", 7, 31)):
        local = got[kind, "w"][:, 3:].flatten()
        assert torch.equal(local[start:stop], own[start:stop].double())
        assert (local[:start] == -99).all() and (local[stop:] == -99).all()
    assert got["param", "scalar"] == 3 and torch.equal(got["param", "narrow"], torch.arange(17.0).double())
    assert [s.name for share in shares for s in share].count("empty") == 1
    assert sum(len(share) for share in shares) <= len(held) + count - 1
    sizes = [sum(s.data.nbytes for s in share) for share in shares]
    assert max(sizes) - min(sizes) <= 2 * 8


def test_a_flat_shard_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="of 4 elements"):
        FlatShard("w", "param", (4,), (0,), (4,), 0, 4, torch.zeros(3))
    with pytest.raises(ValueError, match=r"range \[2, 6\) is not inside its box"):
        FlatShard("w", "param", (4,), (0,), (4,), 2, 6, torch.zeros(4))
    with pytest.raises(ValueError, match="not inside the tensor"):
        FlatShard("w", "param", (4,), (2,), (4,), 0, 4, torch.zeros(4))
    with pytest.raises(ValueError, match="not contiguous"):
        FlatShard.of(ShardSpec("w", (3, 2)), "param", torch.zeros(3, 4)[:, :2])


# --- tiling ---------------------------------------------------------------------------------------------------


@st.composite
def boxes_of(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape and boxes inside it: cut out of it at random places, and then, at times, one of them spoilt."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        index, dim = draw(st.integers(0, len(boxes) - 1)), draw(st.integers(0, max(0, len(shape) - 1)))
        box = boxes[index]
        if not shape or box.shape[dim] < 2:
            continue
        cut = draw(st.integers(1, box.shape[dim] - 1))
        low, high = list(box.shape), list(box.shape)
        low[dim], high[dim] = cut, box.shape[dim] - cut
        moved = list(box.offset)
        moved[dim] += cut
        boxes[index : index + 1] = [Box(box.offset, tuple(low)), Box(tuple(moved), tuple(high))]
    match draw(st.integers(0, 3)):
        case 1:
            boxes.append(draw(st.sampled_from(boxes)))
        case 2:
            boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        case 3:
            boxes[draw(st.integers(0, len(boxes) - 1))] = draw(st.sampled_from(boxes))
    return shape, boxes


@settings(max_examples=300, deadline=None)
@given(boxes_of())
def test_tiling_is_what_counting_every_element_says(drawn: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = drawn
    count = np.zeros(shape, int)
    for box in boxes:
        count[tuple(slice(o, o + s) for o, s in zip(box.offset, box.shape))] += 1
    assert tiles(shape, boxes) == bool((count == 1).all())


def test_boxes_that_would_take_for_ever_are_refused() -> None:
    corners = [Box(index, (1,) * 40) for index in product((0, 1), *[(0,)] * 39)]
    with pytest.raises(ValueError, match="2 boxes that cut 40 dims"):
        tiles((2,) * 40, corners)
    assert prod((2,) * 40) == 1 << 40
