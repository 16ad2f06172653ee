"""Tiles of queries, keys and values: which one a program owns, and how it is loaded and stored."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_of_program(tiles):
    """(tile of the sequence, batch * heads + head). Both in the grid's first number: the others end at 65,535."""
    return tl.program_id(0) % tiles, tl.program_id(0) // tiles


@triton.jit
def load_tile(
    base, first, stride, length, ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, EVEN: tl.constexpr
):
    """``[ROWS, D]`` from row ``first`` on; zeros behind the end of the sequence and of the head dim."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, D)
    # The first row's place may be beyond 2^31 elements; what follows inside the tile is not.
    at = base + first.to(tl.int64) * stride + row[:, None] * stride + column[None, :]
    if EVEN and HEAD_DIM == D:
        tile = tl.load(at)
    elif EVEN:
        tile = tl.load(at, mask=column[None, :] < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(at, mask=(first + row < length)[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(
    base, first, stride, length, tile, ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, EVEN: tl.constexpr
):
    row = tl.arange(0, ROWS)
    column = tl.arange(0, D)
    at = base + first.to(tl.int64) * stride + row[:, None] * stride + column[None, :]
    tile = tile.to(base.dtype.element_ty)
    if EVEN and HEAD_DIM == D:
        tl.store(at, tile)
    else:
        tl.store(at, tile, mask=(first + row < length)[:, None] & (column < HEAD_DIM)[None, :])


@triton.jit
def load_mask(masks, number, query, key, TM: tl.constexpr, TN: tl.constexpr, BLOCK: tl.constexpr):
    """``[TM, TN]`` of a partial block's mask, from ``query, key`` inside the block on."""
    at = (query + tl.arange(0, TM))[:, None] * BLOCK + (key + tl.arange(0, TN))[None, :]
    return tl.load(masks + number.to(tl.int64) * (BLOCK * BLOCK) + at) != 0


@triton.jit
def place_of_step(i, index, MASK: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """Where the tile of step ``i`` begins, in the sequence and in its block. A window's steps are counted over the
    sequence, others over the listed blocks."""
    inside = i % (BLOCK // T) * T
    if MASK == "causal":
        first = i * T
    else:
        first = tl.load(index + i // (BLOCK // T)) * BLOCK + inside
    return first, inside


@triton.jit
def causal(query, key, TM: tl.constexpr, TN: tl.constexpr):
    """``[TM, TN]`` of the mask of queries from ``query`` on and keys from ``key`` on."""
    return (query + tl.arange(0, TM))[:, None] >= (key + tl.arange(0, TN))[None, :]


@triton.jit
def steps_of_row(
    start, partial, index, line, first, WINDOW: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, BLOCK: tl.constexpr
):
    """The first step of a row; the first one with a mask; and the end. All steps of a window have one."""
    if WINDOW:
        middle = tl.load(index + tl.load(start + line)) * (BLOCK // TN)
        begin, end = middle, tl.cdiv(first + TM, TN)
    else:
        begin = tl.load(start + line) * (BLOCK // TN)
        middle = tl.load(partial + line) * (BLOCK // TN)
        end = tl.load(start + line + 1) * (BLOCK // TN)
    return begin, middle, end


@triton.jit
def steps_of_column(
    start, partial, line, first, WINDOW: tl.constexpr, SPLIT: tl.constexpr, TM: tl.constexpr, BLOCK: tl.constexpr
):
    """The first step of a column, or of the program's part of it; the first one with a mask; and the end."""
    begin = tl.load(start + line) * (BLOCK // TM)
    end = tl.load(start + line + 1) * (BLOCK // TM)
    if WINDOW:
        middle = first // TM
        end += first // BLOCK * (BLOCK // TM) - begin
    else:
        middle = tl.load(partial + line) * (BLOCK // TM)
        if SPLIT:
            part, parts, count = tl.program_id(1), tl.num_programs(1), end - begin
            end = begin + count * (part + 1) // parts
            begin = begin + count * part // parts
            middle = tl.minimum(tl.maximum(middle, begin), end)
    return begin, middle, end
