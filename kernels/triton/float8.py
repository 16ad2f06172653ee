"""Casts to FP8 and the product of tensors with scales for blocks.

A program takes a tile, loads it once and writes it as it is and transposed: a layer's weight gradient sums over the
other dim, and tensor cores take 8-bit operands with the summed dim last alone. Where a tile holds whole blocks
(128 x 128) it finds their scales too, so that amax, cast and transpose are one read. Scales of whole rows or tensors
need a read of their own before it. Of a matrix that ranks have in parts, flat ranges of its elements, each finds the
amax of its part (``range_amax``) and casts that (``range_cast``).

Shapes: ``x [g, rows, columns]`` with any strides; a scale each ``[g, row blocks, column blocks]``. Results are views
``[g, rows, columns]`` of ``[rows, g, columns]``: a sequence is a group, activations are ``[s, b, h]``, and one product
over the tokens of all sequences takes them side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.float8 import block_outputs, cast_outputs
from megatron_ds.kernels.triton.common import on_device_of

TILE = {"ROWS": 64, "COLUMNS": 128}  # of the kernels whose blocks are rows or tensors


@triton.jit
def tile_at(program, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The group, the number of the tile along rows and along columns, and the tile's rows and columns."""
    across = tl.cdiv(columns, COLUMNS)
    down = tl.cdiv(rows, ROWS)
    group = (program // (across * down)).to(tl.int64)
    tile_row = program // across % down
    tile_column = program % across
    row = tile_row.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tile_column.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    return group, tile_row, tile_column, row, column


@triton.jit
def magnitude(x):
    """A NaN counts as an infinity: maxima over NaN differ between devices."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def scale_of(amax, SMALLEST: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """:func:`megatron_ds.kernels.float8.scale_of`."""
    scale = tl.div_rn(tl.maximum(amax, SMALLEST), tl.full(amax.shape, LIMIT, tl.float32))
    if POWER_OF_TWO:  # the exponent, one more where there is a mantissa; an infinity stays
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def amax_kernel(
    x, by_row, by_column, x_group, x_row, x_column, groups, rows, columns,
    WHOLE: tl.constexpr, PLAIN: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile's amax, or those of its rows and of its columns: ``[g, rows, tiles]``, ``[g, columns, tiles]``."""
    group, tile_row, tile_column, row, column = tile_at(tl.program_id(0), rows, columns, ROWS, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    at = x + group * x_group + row[:, None] * x_row + column[None, :] * x_column
    found = magnitude(tl.load(at, mask=inside, other=0.0).to(tl.float32))
    if WHOLE:
        tl.store(by_row + tl.program_id(0), tl.max(tl.max(found, 1), 0))
    else:
        if PLAIN:
            of_row = (group * rows + row) * tl.cdiv(columns, COLUMNS) + tile_column
            tl.store(by_row + of_row, tl.max(found, 1), mask=row < rows)
        if TRANSPOSED:
            of_column = (group * columns + column) * tl.cdiv(rows, ROWS) + tile_row
            tl.store(by_column + of_column, tl.max(found, 0), mask=column < columns)


@triton.jit
def cast_kernel(
    x, out, out_t, amax, amax_t, scale, scale_t, x_group, x_row, x_column, groups, rows, columns,
    WHOLE: tl.constexpr, PLAIN: tl.constexpr, TRANSPOSED: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    SMALLEST: tl.constexpr, LIMIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """By scales of whole tensors or rows; of the transpose, columns. The first tile of a scale's writes it."""
    group, tile_row, tile_column, row, column = tile_at(tl.program_id(0), rows, columns, ROWS, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    at = x + group * x_group + row[:, None] * x_row + column[None, :] * x_column
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    element = out.dtype.element_ty
    if PLAIN:
        of_row = group + 0 * row if WHOLE else group * rows + row
        by = scale_of(tl.load(amax + of_row, mask=row < rows, other=1.0), SMALLEST, LIMIT, POWER_OF_TWO)
        to = out + (row[:, None] * groups + group) * columns + column[None, :]
        tl.store(to, tl.div_rn(value, by[:, None]).to(element), mask=inside)
        writes = row == 0 if WHOLE else row < rows
        tl.store(scale + of_row, by, mask=writes & (tile_column == 0))
    if TRANSPOSED:
        of_column = group + 0 * column if WHOLE else group * columns + column
        by = scale_of(tl.load(amax_t + of_column, mask=column < columns, other=1.0), SMALLEST, LIMIT, POWER_OF_TWO)
        to = out_t + (column[:, None] * groups + group) * rows + row[None, :]
        tl.store(to, tl.trans(tl.div_rn(value, by[None, :]).to(element)), mask=tl.trans(inside))
        writes = column == 0 if WHOLE else column < columns
        tl.store(scale_t + of_column, by, mask=writes & (tile_row == 0))


@triton.jit
def block_cast_kernel(
    x, out, out_t, scale, scale_t, x_group, x_row, x_column, groups, rows, columns,
    SQUARE: tl.constexpr, PLAIN: tl.constexpr, TRANSPOSED: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    SMALLEST: tl.constexpr, LIMIT: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """A tile is one block, or a block each row; of the transpose, each column."""
    group, tile_row, tile_column, row, column = tile_at(tl.program_id(0), rows, columns, SIDE, SIDE)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    at = x + group * x_group + row[:, None] * x_row + column[None, :] * x_column
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    found = magnitude(value)
    element = out.dtype.element_ty
    across = tl.cdiv(columns, SIDE)
    down = tl.cdiv(rows, SIDE)
    of_rows = tl.max(found, 1)
    if SQUARE:
        of_rows = tl.full((SIDE,), 0.0, tl.float32) + tl.max(of_rows, 0)
    by_row = scale_of(of_rows, SMALLEST, LIMIT, POWER_OF_TWO)
    if PLAIN:
        to = out + (row[:, None] * groups + group) * columns + column[None, :]
        tl.store(to, tl.div_rn(value, by_row[:, None]).to(element), mask=inside)
        if SQUARE:
            tl.store(scale + (group * down + tile_row) * across + tile_column, tl.max(by_row, 0))
        else:
            tl.store(scale + (group * rows + row) * across + tile_column, by_row, mask=row < rows)
    if TRANSPOSED:
        by_column = by_row if SQUARE else scale_of(tl.max(found, 0), SMALLEST, LIMIT, POWER_OF_TWO)
        to = out_t + (column[:, None] * groups + group) * rows + row[None, :]
        tl.store(to, tl.trans(tl.div_rn(value, by_column[None, :]).to(element)), mask=tl.trans(inside))
        if SQUARE:
            tl.store(scale_t + (group * across + tile_column) * down + tile_row, tl.max(by_column, 0))
        else:
            tl.store(scale_t + (group * columns + column) * down + tile_row, by_column, mask=column < columns)


@triton.jit
def block_product_kernel(
    a, b, out, a_scale, b_scale, m, n, k, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """``a [m, k] @ b [n, k].T``, one block of k at a time, each added in fp32 with its scales."""
    blocks = tl.cdiv(k, SIDE)
    across = tl.cdiv(n, TILE_N)
    first_row = tl.program_id(0) // across * TILE_M
    first_column = tl.program_id(0) % across * TILE_N
    # One 64-bit offset a program and 32-bit ones inside its tile: 64-bit ones for each element spill registers.
    row = tl.arange(0, TILE_M)
    column = tl.arange(0, TILE_N)
    left_rows = a + first_row.to(tl.int64) * k
    right_rows = b + first_column.to(tl.int64) * k
    row_inside = first_row + row < m
    column_inside = first_column + column < n
    of_rows = a_scale + (first_row + row) // A_ROWS * blocks
    of_columns = b_scale + (first_column + column) // B_ROWS * blocks
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for block in range(blocks):
        at = block * SIDE + tl.arange(0, SIDE)
        in_row = at[None, :] < k
        in_column = at[:, None] < k
        left = tl.load(left_rows + (row[:, None] * k + at[None, :]), mask=row_inside[:, None] & in_row, other=0.0)
        right = tl.load(
            right_rows + (column[None, :] * k + at[:, None]), mask=column_inside[None, :] & in_column, other=0.0
        )
        by_row = tl.load(of_rows + block, mask=row_inside, other=0.0)
        by_column = tl.load(of_columns + block, mask=column_inside, other=0.0)
        total += tl.dot(left, right) * by_row[:, None] * by_column[None, :]
    to = out + first_row.to(tl.int64) * n + first_column + (row[:, None] * n + column[None, :])
    tl.store(to, total.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


@triton.jit
def range_tile(program, start, stop, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a tile of a matrix of which there are the elements ``[start, stop)``: its number along rows and columns, its
    rows, its columns, the distance of each of its elements from its first row's beginning, which of them there are, and
    where that beginning lies in the range (before it, in the first tiles)."""
    across = tl.cdiv(k, COLUMNS)
    tile_row = start // k // ROWS + program // across
    tile_column = program % across
    origin = tile_row.to(tl.int64) * ROWS * k
    row = tl.arange(0, ROWS)
    column = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    at = row[:, None] * k + column[None, :]
    first = tl.maximum(start - origin, 0).to(tl.int32)
    last = tl.minimum(stop - origin, ROWS * k).to(tl.int32)
    inside = (column[None, :] < k) & (at >= first) & (at < last)
    return tile_row, tile_column, tile_row * ROWS + row, column, at, inside, origin - start


@triton.jit
def range_amax_kernel(
    flat, amax, amax_t, start, stop, k, WHOLE: tl.constexpr, SQUARE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Raises amax to that of a flat range of a matrix: bits of fp32 as integers, of which a NaN is the largest."""
    tile_row, tile_column, row, column, at, inside, origin = range_tile(tl.program_id(0), start, stop, k, ROWS, COLUMNS)
    value = tl.load(flat + origin + at, mask=inside, other=0.0).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if WHOLE:
        tl.atomic_max(amax, tl.max(tl.max(bits, 1), 0))
    elif SQUARE:
        tl.atomic_max(amax + tile_row * tl.cdiv(k, COLUMNS) + tile_column, tl.max(tl.max(bits, 1), 0))
    else:
        there = tl.max(inside.to(tl.int32), 1) > 0
        tl.atomic_max(amax + row, tl.max(bits, 1), mask=there)
        tl.atomic_max(amax_t + column, tl.max(bits, 0), mask=column < k)


@triton.jit
def range_cast_kernel(
    flat, codes, codes_t, scale, scale_t, start, stop, k, WHOLE: tl.constexpr, SQUARE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A flat range of a matrix by given scales, and once more by those of the transpose where they are others."""
    tile_row, tile_column, row, column, at, inside, origin = range_tile(tl.program_id(0), start, stop, k, ROWS, COLUMNS)
    value = tl.load(flat + origin + at, mask=inside, other=0.0).to(tl.float32)
    element = codes.dtype.element_ty
    if WHOLE:
        by = tl.load(scale + 0 * row)
    elif SQUARE:
        by = tl.load(scale + tile_row * tl.cdiv(k, COLUMNS) + tile_column + 0 * row)
    else:
        by = tl.load(scale + row, mask=tl.max(inside.to(tl.int32), 1) > 0, other=1.0)
        by_column = tl.load(scale_t + column, mask=column < k, other=1.0)
        tl.store(codes_t + origin + at, tl.div_rn(value, by_column[None, :]).to(element), mask=inside)
    tl.store(codes + origin + at, tl.div_rn(value, by[:, None]).to(element), mask=inside)


def _launch(x: Tensor, rows: int, columns: int) -> tuple[tuple[int], tuple[int, ...]]:
    """The grid of tiles, and what every kernel wants to know of ``x``."""
    groups, height, width = x.shape
    return (groups * triton.cdiv(height, rows) * triton.cdiv(width, columns),), (*x.stride(), *x.shape)


def amax(x: Tensor, whole: bool, plain: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    """Of whole tensors ``[g, 1, 1]`` and nothing, or of rows ``[g, rows, 1]`` and columns ``[g, columns, 1]``; fp32."""
    groups, rows, columns = x.shape
    grid, facts = _launch(x, TILE["ROWS"], TILE["COLUMNS"])
    across, down = triton.cdiv(columns, TILE["COLUMNS"]), triton.cdiv(rows, TILE["ROWS"])
    shapes = ((groups, 1, across * down), (0,)) if whole else ((groups, rows, across), (groups, columns, down))
    by_row, by_column = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    with on_device_of(x):
        amax_kernel[grid](x, by_row, by_column, *facts, WHOLE=whole, PLAIN=plain, TRANSPOSED=transposed, **TILE)
    return by_row.amax(-1, keepdim=True), by_column if whole else by_column.amax(-1, keepdim=True)


def _launch_range(flat: Tensor, start: int, k: int, whole: bool, side: int | None) -> tuple[tuple[int], Any, Any]:
    """The grid of the tiles in which a flat range of a matrix has elements, where it lies, and how tiles are cut."""
    tile = TILE if side is None else {"ROWS": side, "COLUMNS": side}
    stop, strip = start + flat.numel(), tile["ROWS"] * k
    down = triton.cdiv(stop, strip) - start // strip
    how = {"WHOLE": whole, "SQUARE": side is not None, **tile, "num_warps": 8 if side == 128 else 4}
    return (down * triton.cdiv(k, tile["COLUMNS"]),), (start, stop, k), how


def range_amax(flat: Tensor, start: int, k: int, whole: bool, side: int | None, amax: Sequence[Tensor]) -> None:
    """Raise the amax of a matrix's blocks, fp32, to that of its elements ``flat [n]``, from element ``start`` on.

    Args:
        k: columns of the matrix.
        whole: the matrix is one block. side: of square ones; None: they are rows, and of the transpose columns.
    """
    grid, place, how = _launch_range(flat, start, k, whole, side)
    with on_device_of(flat):
        range_amax_kernel[grid](flat, amax[0].view(torch.int32), amax[-1].view(torch.int32), *place, **how)


def range_cast(
    flat: Tensor, start: int, k: int, whole: bool, side: int | None, scales: Sequence[Tensor], codes: Sequence[Tensor]
) -> None:
    """The same elements by the scales of their blocks into ``codes``, each ``[n]``, as of :func:`range_amax`."""
    grid, place, how = _launch_range(flat, start, k, whole, side)
    with on_device_of(flat):
        range_cast_kernel[grid](flat, codes[0], codes[-1], scales[0], scales[-1], *place, **how)


def cast(
    x: Tensor, amax: Tensor, amax_t: Tensor, whole: bool, plain: bool, transposed: bool, dtype: torch.dtype,
    power_of_two: bool, smallest: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``[g, rows, columns]`` and its transpose, and the scales of both, which follow from a given amax."""
    amaxes = amax.contiguous(), amax_t.contiguous()
    made = cast_outputs(x, *amaxes, whole, plain, transposed, dtype)
    grid, facts = _launch(x, TILE["ROWS"], TILE["COLUMNS"])
    with on_device_of(x):
        cast_kernel[grid](
            x, *made[:2], *amaxes, *made[2:], *facts, WHOLE=whole, PLAIN=plain, TRANSPOSED=transposed,
            POWER_OF_TWO=power_of_two, SMALLEST=smallest, LIMIT=torch.finfo(dtype).max, **TILE,
        )  # fmt: skip
    return made


def block_cast(
    x: Tensor, side: int, square: bool, plain: bool, transposed: bool, dtype: torch.dtype, power_of_two: bool,
    smallest: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``[g, rows, columns]`` and its transpose by blocks of ``side``, and the scales of both."""
    made = block_outputs(x, side, square, plain, transposed, dtype)
    grid, facts = _launch(x, side, side)
    with on_device_of(x):
        block_cast_kernel[grid](
            x, *made, *facts, SQUARE=square, PLAIN=plain, TRANSPOSED=transposed,
            POWER_OF_TWO=power_of_two, SMALLEST=smallest, LIMIT=torch.finfo(dtype).max, SIDE=side, num_warps=8,
        )  # fmt: skip
    return made


def block_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_rows: int, b_rows: int, side: int, dtype: torch.dtype
) -> Tensor:
    """``[m, k] @ [n, k].T``, with scales of ``a_rows x side`` and ``b_rows x side``."""
    (m, k), n = a.shape, b.shape[0]
    out = a.new_empty((m, n), dtype=dtype)
    tile = {"TILE_M": 128, "TILE_N": 128} if m > 64 else {"TILE_M": 64, "TILE_N": 128}
    grid = (triton.cdiv(m, tile["TILE_M"]) * triton.cdiv(n, tile["TILE_N"]),)
    scales = a_scale.contiguous(), b_scale.contiguous()
    with on_device_of(a):
        block_product_kernel[grid](
            a.contiguous(), b.contiguous(), out, *scales, m, n, k, A_ROWS=a_rows, B_ROWS=b_rows, SIDE=side,
            num_warps=8, num_stages=3, **tile,
        )  # fmt: skip
    return out
