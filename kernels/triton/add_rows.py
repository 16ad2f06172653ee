"""Rows added to the rows of a table, repeated ones in a fixed order: the gradient of an embedding.

The indices come sorted. The program at the first of equal ones adds up their rows, some at a time, and then to the
table. Where many are equal (padding) it does so to the end of its part of the indices only; the program at the start of
each following part leaves the sum of that part, and the sums are added to the table's row in another launch. So no
program takes more than a part, each element is written once a launch, and two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.triton.common import as_rows, on_device_of

ROWS, BLOCK = 16, 128
PART = 512


@triton.jit
def add_rows_kernel(
    total, rows, places, order, sums_of_parts, total_stride, rows_stride, count, columns,
    PART: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0)
    place = tl.load(places + start)
    is_first = tl.load(places + start - 1, mask=start > 0, other=-1) != place
    if is_first | (start % PART == 0):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        own = column < columns
        at = total + place * total_stride + column
        sums = tl.load(at, mask=own & is_first, other=0.0)
        end = tl.minimum(count, (start // PART + 1) * PART)
        number = start + tl.arange(0, ROWS)
        equal = tl.load(places + number, mask=number < end, other=-1) == place
        while tl.max(equal.to(tl.int32), axis=0) > 0:
            source = tl.load(order + number, mask=equal, other=0)
            some = rows + source[:, None] * rows_stride + column[None, :]
            sums += tl.sum(tl.load(some, mask=equal[:, None] & own[None, :], other=0.0).to(tl.float32), axis=0)
            number += ROWS
            equal = tl.load(places + number, mask=number < end, other=-1) == place
        tl.store(at, sums, mask=own & is_first)
        tl.store(sums_of_parts + (start // PART).to(tl.int64) * columns + column, sums, mask=own & (is_first == 0))


@triton.jit
def add_parts_kernel(
    total, places, sums_of_parts, total_stride, parts, columns,
    PART: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The program of the first part that goes on with an index of the part before adds up all that do."""
    first = tl.program_id(0) + 1
    place = tl.load(places + first * PART)
    goes_on = tl.load(places + first * PART - 1) == place
    before = tl.load(places + (first - 1) * PART - 1, mask=first > 1, other=-1)
    if goes_on & (before != place):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        own = column < columns
        at = total + place * total_stride + column
        sums = tl.load(at, mask=own, other=0.0)
        part = first + tl.arange(0, ROWS)
        equal = tl.load(places + part * PART, mask=part < parts, other=-1) == place
        while tl.max(equal.to(tl.int32), axis=0) > 0:
            some = sums_of_parts + part.to(tl.int64)[:, None] * columns + column[None, :]
            sums += tl.sum(tl.load(some, mask=equal[:, None] & own[None, :], other=0.0), axis=0)
            part += ROWS
            equal = tl.load(places + part * PART, mask=part < parts, other=-1) == place
        tl.store(at, sums, mask=own)


def add_rows_(total: Tensor, rows: Tensor, places: Tensor, order: Tensor) -> None:
    rows = as_rows(rows)
    count, columns = rows.shape
    if places.shape != (count,) or order.shape != (count,) or total.shape[1] != columns or total.stride(1) != 1:
        raise ValueError(f"{tuple(rows.shape)} rows and {tuple(places.shape)} indices for a table {tuple(total.shape)}")
    if rows.numel():
        parts, across = triton.cdiv(count, PART), triton.cdiv(columns, BLOCK)
        sums = total.new_empty((parts, columns), dtype=torch.float32)
        tile = {"PART": PART, "ROWS": ROWS, "BLOCK": BLOCK, "num_warps": 4}
        with on_device_of(total):
            add_rows_kernel[(count, across)](
                total, rows, places, order, sums, total.stride(0), rows.stride(0), count, columns, **tile
            )
            if parts > 1:
                add_parts_kernel[(parts - 1, across)](total, places, sums, total.stride(0), parts, columns, **tile)
