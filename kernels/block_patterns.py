"""Layouts of block-sparse attention by name.

The layouts by name are those of Child et al. 2019 ("fixed"), its generalisation "variable", Zaheer et al. 2020
("bigbird") and Beltagy et al. 2020 ("bslongformer"), with the parameters of DeepSpeed's sparse attention, whose
configurations people have. Two things differ: with ``causal`` no token sees the future inside a diagonal block either,
and random blocks are a function of (seed, head, row of blocks), on every mesh and for every length of a causal layout.

Every function takes the tokens of a sequence, the tokens along a block's side and the heads of the whole model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_ds.errors import ConfigError
from megatron_ds.kernels.block_layout import FULL, BlockLayout, build, check_size


class _Side:
    """Draws sets of blocks on one pattern; ``causal`` leaves out what lies above the diagonal."""

    def __init__(self, length: int, block: int, causal: bool):
        check_size(length, block)
        self.side, self.causal = -(-length // block), causal
        self.all = torch.arange(self.side)
        self.keys: list[Tensor] = []

    def add(self, row: Tensor, column: Tensor) -> None:
        self.keys.append(row * self.side + column)

    def add_spans(self, row: Tensor, start: Tensor, end: Tensor) -> None:
        """On each row the columns from ``start`` up to ``end``."""
        if self.causal:
            end = end.minimum(row + 1)
        self.add(*_expand(row, start.clamp(min=0), end.clamp(max=self.side)))

    def add_columns(self, column: Tensor) -> None:
        """All rows of these columns."""
        column = column[(column >= 0) & (column < self.side)]
        start = column if self.causal else torch.zeros_like(column)
        columns, rows = _expand(column, start, torch.full_like(column, self.side))
        self.add(rows, columns)

    def add_rows(self, row: Tensor) -> None:
        row = row[(row >= 0) & (row < self.side)]
        self.add_spans(row, torch.zeros_like(row), torch.full_like(row, self.side))

    def add_windows(self, sizes: Sequence[int]) -> None:
        """Square windows along the diagonal, of these sizes; the last size repeats."""
        repeats = max(0, -(-(self.side - sum(sizes)) // sizes[-1]))
        ends = torch.tensor([*sizes, *[sizes[-1]] * repeats]).cumsum(0)
        window = torch.searchsorted(ends, self.all, right=True)
        starts = torch.cat([ends.new_zeros(1), ends])
        self.add_spans(self.all, starts[window], ends[window])

    def add_sliding(self, width: int) -> None:
        """``width`` blocks around the diagonal block, of which causality leaves the left half."""
        if width % 2 == 0:
            raise ConfigError(
                f"num_sliding_window_blocks={width} is even: it counts a block and as many on either side; "
                f"use {width - 1} or {width + 1}"
            )
        self.add_spans(self.all, self.all - width // 2, self.all + width // 2 + 1)

    def add_random(self, count: int, seed: int, head: int) -> None:
        """``count`` different columns on each row, uniformly from those there are.

        Floyd's sampling (Bentley and Floyd 1987) on all rows at once; each number is a hash of (seed, head, row, draw),
        so that a row keeps its blocks when the sequence grows.
        """
        there = self.all + 1 if self.causal else torch.full_like(self.all, self.side)
        drawn = torch.full((self.side, count), -1)
        for draw in range(count):
            top = there - there.clamp(max=count) + draw  # the largest column of this draw
            pick = _hash(seed, head, self.all, draw) % (top + 1).clamp(min=1)
            pick = torch.where((drawn == pick.unsqueeze(1)).any(1), top, pick)
            drawn[:, draw] = torch.where(draw < there, pick, -1)
        row, place = (drawn >= 0).nonzero(as_tuple=True)
        self.add(row, drawn[row, place])

    def blocks(self) -> Tensor:
        return torch.cat(self.keys).unique()


def _layout(length: int, block: int, causal: bool, pattern: Tensor, draw: Callable[[_Side, int], None]) -> BlockLayout:
    """``draw(side, i)`` draws pattern ``i``."""
    keys = []
    for number in range(int(pattern.max()) + 1):
        one = _Side(length, block, causal)
        draw(one, number)
        keys.append(one.blocks() + number * one.side**2)
    side = -(-length // block)
    key = torch.cat(keys)
    line, column = key // side, key % side
    mask = torch.full_like(key, FULL)
    if causal:
        masks = torch.ones(1, block, block, dtype=torch.bool).tril()
        mask[line % side == column] = 0
    elif length % block:
        masks = (torch.arange(block) < length % block).expand(1, block, block).contiguous()
        mask[column == side - 1] = 0
    else:
        masks = torch.ones(0, block, block, dtype=torch.bool)
    return build(length, block, pattern, line, column, mask, masks)


def _same(heads: int) -> Tensor:
    return torch.zeros(heads, dtype=torch.int64)


def dense(length: int, block: int, heads: int, *, causal: bool = True) -> BlockLayout:
    """Every block."""
    return _layout(length, block, causal, _same(heads), lambda side, _: side.add_rows(side.all))


def sliding_window(
    length: int, block: int, heads: int, *, causal: bool = True, num_sliding_window_blocks: int = 3
) -> BlockLayout:
    """A band along the diagonal, ``num_sliding_window_blocks`` (odd) wide; causal: its lower half and the diagonal."""
    return _layout(length, block, causal, _same(heads), lambda side, _: side.add_sliding(num_sliding_window_blocks))


def fixed(
    length: int,
    block: int,
    heads: int,
    *,
    causal: bool = True,
    num_local_blocks: int = 4,
    num_global_blocks: int = 1,
    num_different_global_patterns: int = 1,
    horizontal_global_attention: bool = False,
) -> BlockLayout:
    """Child et al. 2019, section 4.2: windows of ``num_local_blocks``, and the blocks that stand for a window.

    Every row sees the last ``num_global_blocks`` columns of each window. With several patterns head ``h`` takes those
    before them, ``h % num_different_global_patterns`` times. With ``horizontal_global_attention`` those blocks' rows
    see everything too.
    """
    versions = num_local_blocks // num_global_blocks
    if num_local_blocks % num_global_blocks or num_different_global_patterns > versions:
        raise ConfigError(
            f"num_local_blocks={num_local_blocks} must be a multiple of num_global_blocks={num_global_blocks}, and has "
            f"room for {versions} different global patterns, not {num_different_global_patterns}"
        )

    def draw(side: _Side, number: int) -> None:
        offset = num_local_blocks - (1 + number) * num_global_blocks
        whole = side.side // num_local_blocks * num_local_blocks
        first = torch.arange(0, whole, num_local_blocks) + offset
        if whole < side.side:  # the last window is short: its last blocks stand for it
            first = torch.cat([first, torch.tensor([max(0, min(whole + offset, side.side - num_global_blocks))])])
        chosen = (first.unsqueeze(1) + torch.arange(num_global_blocks)).flatten()
        side.add_windows([num_local_blocks])
        side.add_columns(chosen)
        if horizontal_global_attention:
            side.add_rows(chosen)

    return _layout(length, block, causal, torch.arange(heads) % num_different_global_patterns, draw)


def variable(
    length: int,
    block: int,
    heads: int,
    *,
    causal: bool = True,
    num_random_blocks: int = 0,
    local_window_blocks: Sequence[int] = (4,),
    global_block_indices: Sequence[int] = (0,),
    global_block_end_indices: Sequence[int] = (),
    horizontal_global_attention: bool = False,
    different_layout_per_head: bool = False,
    seed: int = 0,
) -> BlockLayout:
    """Windows of any sizes (the last one repeats), any global columns, random blocks.

    ``global_block_indices`` are blocks; with ``global_block_end_indices`` they are where ranges of blocks begin.
    """
    if not local_window_blocks or min(local_window_blocks) < 1:
        raise ConfigError(f"local_window_blocks={list(local_window_blocks)} must be positive numbers, one at least")
    chosen = _global_blocks(global_block_indices, global_block_end_indices)

    def draw(side: _Side, head: int) -> None:
        side.add_windows(local_window_blocks)
        side.add_random(num_random_blocks, seed, head)
        side.add_columns(chosen)
        if horizontal_global_attention:
            side.add_rows(chosen)

    return _layout(length, block, causal, _random_patterns(heads, different_layout_per_head), draw)


def bigbird(
    length: int,
    block: int,
    heads: int,
    *,
    causal: bool = True,
    num_random_blocks: int = 1,
    num_sliding_window_blocks: int = 3,
    num_global_blocks: int = 1,
    different_layout_per_head: bool = False,
    seed: int = 0,
) -> BlockLayout:
    """Zaheer et al. 2020, figure 1 and section 2: a band, random blocks, and the first blocks global both ways."""

    def draw(side: _Side, head: int) -> None:
        side.add_sliding(num_sliding_window_blocks)
        side.add_random(num_random_blocks, seed, head)
        side.add_columns(side.all[:num_global_blocks])
        side.add_rows(side.all[:num_global_blocks])

    return _layout(length, block, causal, _random_patterns(heads, different_layout_per_head), draw)


def bslongformer(
    length: int,
    block: int,
    heads: int,
    *,
    causal: bool = True,
    num_sliding_window_blocks: int = 3,
    global_block_indices: Sequence[int] = (0,),
    global_block_end_indices: Sequence[int] = (),
) -> BlockLayout:
    """Beltagy et al. 2020, section 3.1, in blocks: a band, and chosen blocks global both ways."""
    chosen = _global_blocks(global_block_indices, global_block_end_indices)

    def draw(side: _Side, _: int) -> None:
        side.add_sliding(num_sliding_window_blocks)
        side.add_columns(chosen)
        side.add_rows(chosen)

    return _layout(length, block, causal, _same(heads), draw)


PATTERNS: Mapping[str, Callable[..., BlockLayout]] = MappingProxyType(
    {
        "dense": dense,
        "fixed": fixed,
        "variable": variable,
        "bigbird": bigbird,
        "bslongformer": bslongformer,
        "sliding_window": sliding_window,
    }
)


def parameters_of(name: str) -> set[str]:
    """The parameters of a layout of :data:`PATTERNS`, besides those that all have."""
    own = inspect.signature(PATTERNS[name]).parameters.values()
    return {p.name for p in own if p.kind == p.KEYWORD_ONLY} - {"causal"}


def _random_patterns(heads: int, different: bool) -> Tensor:
    return torch.arange(heads) if different else _same(heads)


def _global_blocks(starts: Sequence[int], ends: Sequence[int]) -> Tensor:
    if not ends:
        return torch.tensor(sorted(set(starts)), dtype=torch.int64)
    if len(ends) != len(starts) or any(end <= start for start, end in zip(starts, ends)):
        raise ConfigError(
            f"global_block_end_indices={list(ends)} must be one for each of global_block_indices={list(starts)}, and "
            "lie behind it"
        )
    return torch.tensor(sorted({i for start, end in zip(starts, ends) for i in range(start, end)}), dtype=torch.int64)


def _expand(row: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) of every column in ``start .. end`` of every row."""
    count = (end - start).clamp(min=0)
    before = count.cumsum(0) - count
    column = torch.arange(int(count.sum())) + (start - before).repeat_interleave(count)
    return row.repeat_interleave(count), column


def _hash(seed: int, head: int, rows: Tensor, draw: int) -> Tensor:
    """63-bit numbers, int64: the finaliser of splitmix64 (Steele et al. 2014) over the words one after another."""

    def mix(x: Tensor) -> Tensor:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
        return x

    x = mix(torch.full_like(rows, _signed(seed + 0x9E3779B97F4A7C15)))
    for word in (head, rows, draw):
        x = mix((x ^ word) + _signed(0x9E3779B97F4A7C15))
    return x & 0x7FFFFFFFFFFFFFFF


def _signed(x: int) -> int:
    x &= 0xFFFFFFFFFFFFFFFF
    return x - (1 << 64) if x >> 63 else x
