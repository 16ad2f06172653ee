"""Layouts against loops over rows and columns, written from the papers and the documentation of their parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from megatron_ds.errors import ConfigError
from megatron_ds.kernels import block_patterns as patterns
from megatron_ds.kernels.block_layout import FULL, BlockLayout, BlockLists, from_block_mask, from_mask

BLOCK = 16


def live(layout: BlockLayout) -> Tensor:
    """``[n, t, t]`` bool, from the lists by row, one entry after another."""
    found = torch.zeros(layout.heads, layout.side, layout.side, dtype=torch.bool)
    for head in range(layout.heads):
        for row in range(layout.side):
            line = int(layout.pattern[head]) * layout.side + row
            for entry in range(int(layout.rows.start[line]), int(layout.rows.start[line + 1])):
                assert not found[head, row, layout.rows.index[entry]], "a block is listed twice"
                found[head, row, layout.rows.index[entry]] = True
    return found


def loops(side: int, causal: bool, rule: Callable[[int, int], bool]) -> Tensor:
    return torch.tensor([[(c <= r or not causal) and rule(r, c) for c in range(side)] for r in range(side)])


def band(width: int) -> Callable[[int, int], bool]:
    return lambda r, c: abs(r - c) <= width // 2


def fixed_rule(side: int, local: int, count: int, version: int, horizontal: bool) -> Callable[[int, int], bool]:
    """Child et al. 2019; a last window that is short is stood for by the last blocks it can offer."""
    chosen = set()
    for start in range(0, side, local):
        first = start + local - (1 + version) * count
        if start + local > side:
            first = min(first, side - count)
        chosen |= set(range(first, first + count))
    return lambda r, c: r // local == c // local or c in chosen or (horizontal and r in chosen)


def variable_rule(windows: list[int], chosen: set[int]) -> Callable[[int, int], bool]:
    window = [number for number, size in enumerate(windows) for _ in range(size)]
    while len(window) < 99:
        window += [window[-1] + 1] * windows[-1]
    return lambda r, c: window[r] == window[c] or c in chosen


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", [1, 2, 9, 14])
def test_layouts_without_chance_are_those_of_the_papers(side: int, causal: bool) -> None:
    def check(layout: BlockLayout, *rules: Callable[[int, int], bool]) -> None:
        for head, rule in enumerate(rules):
            assert torch.equal(live(layout)[head], loops(side, causal, rule)), head

    make: dict[str, Any] = {"length": side * BLOCK, "block": BLOCK, "heads": 3, "causal": causal}
    check(patterns.dense(**make), *[lambda r, c: True] * 3)
    check(patterns.sliding_window(**make, num_sliding_window_blocks=5), *[band(5)] * 3)
    check(
        patterns.fixed(**make, num_local_blocks=4, num_global_blocks=2, num_different_global_patterns=2),
        *[fixed_rule(side, 4, 2, version, False) for version in (0, 1, 0)],
    )
    check(patterns.fixed(**make, horizontal_global_attention=True), *[fixed_rule(side, 4, 1, 0, True)] * 3)
    check(
        patterns.variable(**make, local_window_blocks=[2, 3, 1], global_block_indices=[5, 1]),
        *[variable_rule([2, 3, 1], {1, 5})] * 3,
    )
    check(
        patterns.variable(**make, global_block_indices=[1, 6], global_block_end_indices=[3, 99]),
        *[variable_rule([4], {1, 2, *range(6, 99)})] * 3,
    )
    check(
        patterns.bslongformer(**make, global_block_indices=[0, 4]),
        *[lambda r, c: band(3)(r, c) or bool({r, c} & {0, 4})] * 3,
    )
    check(
        patterns.bigbird(**make, num_random_blocks=0, num_global_blocks=2),
        *[lambda r, c: band(3)(r, c) or min(r, c) < 2] * 3,
    )


@pytest.mark.parametrize("causal", [True, False])
def test_random_blocks_are_drawn_without_repetition_and_uniformly(causal: bool) -> None:
    side, count, heads = 12, 3, 400
    layout = patterns.variable(
        side * BLOCK, BLOCK, heads, causal=causal, num_random_blocks=count, local_window_blocks=[1],
        global_block_indices=[], different_layout_per_head=True,
    )  # fmt: skip
    drawn = live(layout)
    for row in range(side):
        there = row + 1 if causal else side
        # The window adds the diagonal block where it was not drawn.
        others = drawn[:, row, torch.arange(side) != row]
        assert set(others.sum(1).tolist()) <= {min(count, there) - 1, min(count, there)}
        if there > count + 1:
            want = count / there  # of each of the other columns; four standard deviations of a mean of 400
            error = (others[:, : there - 1 if causal else side - 1].double().mean(0) - want).abs().max()
            assert error < 4 * (want * (1 - want) / heads) ** 0.5, row


def random_layout(length: int, **settings: Any) -> Tensor:
    settings = {"num_random_blocks": 2, "different_layout_per_head": True, "seed": 5, **settings}
    return live(patterns.bigbird(length, BLOCK, **{"heads": 4, **settings}))


def test_random_blocks_follow_from_seed_head_and_row_alone() -> None:
    layout = random_layout(320)
    assert torch.equal(layout, random_layout(320))
    torch.manual_seed(9)
    assert torch.equal(layout, random_layout(320)), "a generator has a say"
    assert torch.equal(layout[:, :9, :9], random_layout(144)), "a longer sequence has other blocks"
    assert torch.equal(layout[:2], random_layout(320, heads=2)), "more heads, other blocks"
    assert not torch.equal(layout, random_layout(320, seed=6))
    assert not torch.equal(layout, random_layout(320, seed=5 + (1 << 40)))
    assert not torch.equal(layout[0], layout[1])
    same = random_layout(320, different_layout_per_head=False)
    assert all(torch.equal(same[0], same[head]) for head in range(4))


LAYOUTS: dict[str, Callable[..., BlockLayout]] = {
    "dense": patterns.dense,
    "sliding_window": patterns.sliding_window,
    "fixed": partial(patterns.fixed, num_different_global_patterns=3),
    "variable": partial(patterns.variable, num_random_blocks=1, local_window_blocks=[2, 1]),
    "bigbird": partial(patterns.bigbird, different_layout_per_head=True),
    "bslongformer": patterns.bslongformer,
}


@pytest.fixture(params=[(name, causal, length) for name in LAYOUTS for causal in (True, False) for length in (144, 91)])
def layout(request: pytest.FixtureRequest) -> BlockLayout:
    name, causal, length = request.param
    made = LAYOUTS[name](length, BLOCK, 5, causal=causal)
    tokens = live(made).repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :length, :length]
    if causal:
        tokens = tokens & torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(made.to_mask(), tokens), "the mask is the live blocks', below the diagonal"
    return made


def test_the_transpose_lists_the_same_blocks_with_the_same_masks(layout: BlockLayout) -> None:
    def entries(lists: BlockLists) -> list[tuple[int, int, int, int]]:
        found = []
        for line in range(len(lists.partial)):
            begin, middle, end = int(lists.start[line]), int(lists.partial[line]), int(lists.start[line + 1])
            kinds = lists.mask[begin:end] != FULL
            assert torch.equal(kinds, torch.arange(begin, end) >= middle), "full ones first"
            for entry in range(begin, end):
                place = line % layout.side, int(lists.index[entry])
                found.append((line // layout.side, *place, int(lists.mask[entry])))
        return found

    by_column = [(pattern, row, column, mask) for pattern, column, row, mask in entries(layout.columns)]
    assert sorted(by_column) == sorted(entries(layout.rows))


def test_long_columns_are_the_global_ones_of_a_sparse_layout() -> None:
    layout = patterns.bigbird(640, 16, 4, num_global_blocks=2, different_layout_per_head=True)
    assert layout.long_columns.tolist() == [0, 1] and layout.short_columns.tolist() == list(range(2, 40))
    for even in (patterns.dense(640, 16, 2), patterns.sliding_window(640, 16, 2), patterns.bigbird(160, 16, 2)):
        assert not len(even.long_columns) and even.short_columns.tolist() == list(range(even.side))


def is_band(allowed: Tensor, block: int) -> bool:
    """Whether each head's queries see all keys from their block's first one on: ``[n, s, s]``, token by token."""
    for head in allowed:
        last = 0
        for query, keys in enumerate(head.tolist()):
            first = keys.index(True) if any(keys) else query + 1
            if first < last or first % block or query // block - first // block > 7:
                return False
            if query % block and first != last:
                return False
            if keys != [first <= key <= query for key in range(len(keys))]:
                return False
            last = first
    return True


def test_windows_are_known(layout: BlockLayout) -> None:
    assert layout.is_window == is_band(layout.to_mask(), layout.block)


def test_what_is_no_window() -> None:
    query, key = torch.arange(160).view(-1, 1), torch.arange(160)
    starts = torch.tensor([0, 0, 1, 1, 3, 3, 5, 7, 7, 7]).repeat_interleave(BLOCK).view(-1, 1) * BLOCK
    window = (key >= starts) & (key <= query)
    assert from_mask(window.expand(2, -1, -1), BLOCK).is_window
    others = {
        "the second head is none": torch.stack([window, window & (key != 40)]),
        "a block is missing": window & ~((query // BLOCK == 5) & (key // BLOCK == 4)),
        "a row begins before the one above": window | (key // BLOCK == 4) & (query // BLOCK == 8),
        "a row sees nothing": window & (query // BLOCK != 6),
        "a row sees too much": window | (key // BLOCK == 3) & (query // BLOCK == 2),
        "long rows": key <= query,
    }
    for name, allowed in others.items():
        layout = from_mask(allowed.expand(2, -1, -1), BLOCK)
        assert not layout.is_window and not is_band(layout.to_mask(), BLOCK), name
    assert patterns.sliding_window(160, BLOCK, 2, num_sliding_window_blocks=15).is_window
    assert not patterns.sliding_window(160, BLOCK, 2, num_sliding_window_blocks=17).is_window
    assert patterns.sliding_window(160, BLOCK, 4).of_heads(1, 2).to("meta").is_window


def test_a_rank_takes_its_own_heads(layout: BlockLayout) -> None:
    whole = layout.to_mask()
    for first, count in ((0, 5), (0, 2), (2, 2), (4, 1)):
        part = layout.of_heads(first, count)
        assert torch.equal(part.to_mask(), whole[first : first + count])
        assert torch.equal(part.live_blocks(), layout.live_blocks()[first : first + count])
        assert len(part.rows.partial) <= count * layout.side, "patterns of other ranks' heads are kept"


def test_masks_and_block_masks_there_and_back(layout: BlockLayout) -> None:
    whole = layout.to_mask()
    assert torch.equal(from_mask(whole, BLOCK).to_mask(), whole)
    block_mask = layout.to_block_mask()
    assert block_mask.shape == (1, *whole.shape)
    again = from_block_mask(block_mask)
    assert torch.equal(again.to_mask(), whole)
    assert torch.equal(again.live_blocks(), layout.live_blocks())
    assert layout.density() == live(layout).double().mean()


def test_block_masks_of_flex_attention() -> None:
    """Token-level windows and documents, as FlexAttention's users write them."""
    documents = torch.arange(100) // 23

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < 20 + 30 * h) & (documents[q] == documents[k])

    layout = from_block_mask(create_block_mask(allowed, 1, 2, 100, 100, device="cpu", BLOCK_SIZE=32))
    h, q, k = torch.meshgrid(torch.arange(2), torch.arange(100), torch.arange(100), indexing="ij")
    assert torch.equal(layout.to_mask(), allowed(h, h, q, k))
    with pytest.raises(ConfigError, match=r"\[2, 1, 64, 64\].*must be \[1, heads, s, s\]"):
        from_block_mask(create_block_mask(lambda b, h, q, k: q >= k, 2, 1, 64, 64, device="cpu", BLOCK_SIZE=32))


def test_a_mask_without_blocks() -> None:
    allowed = torch.zeros(2, 40, 40, dtype=torch.bool)
    assert from_mask(allowed, BLOCK).live_blocks().tolist() == [0, 0]
    assert torch.equal(from_mask(allowed, BLOCK).to_mask(), allowed)


def test_memory_grows_with_live_blocks() -> None:
    entries = [len(patterns.bigbird(length, 64, 4).rows.index) for length in (8192, 16384, 32768)]
    assert [b / a for a, b in pairwise(entries)] == pytest.approx([2, 2], rel=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: patterns.dense(64, 24, 1), "block=24 is not one of 16, 32, 64, 128"),
        (lambda: patterns.dense(0, 16, 1), "0 tokens"),
        (lambda: patterns.sliding_window(64, 16, 1, num_sliding_window_blocks=4), "=4 is even.*use 3 or 5"),
        (lambda: patterns.fixed(64, 16, 1, num_local_blocks=4, num_global_blocks=3), "4 must be a multiple of .*=3"),
        (lambda: patterns.fixed(64, 16, 1, num_different_global_patterns=5), "room for 4 different .*, not 5"),
        (lambda: patterns.variable(64, 16, 1, local_window_blocks=[2, 0]), r"\[2, 0\] must be positive"),
        (lambda: patterns.variable(64, 16, 1, global_block_end_indices=[0]), r"\[0\] must .* lie behind"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(make: Callable[[], BlockLayout], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
