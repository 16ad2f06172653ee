"""Rows added to the rows of a table, repeated ones in a fixed order: the gradient of an embedding.

The indices come sorted. The program at the first of equal ones adds up all of their rows, some at a time, and then to
the table: each element of it is written once, and two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.triton.common import as_rows, on_device_of

ROWS, BLOCK = 16, 128


@triton.jit
def add_rows_kernel(
    total, rows, places, order, total_stride, rows_stride, count, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0)
    place = tl.load(places + start)
    before = tl.load(places + start - 1, mask=start > 0, other=-1)
    if place != before:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        own = column < columns
        at = total + place * total_stride + column
        sums = tl.load(at, mask=own, other=0.0)
        number = start + tl.arange(0, ROWS)
        equal = tl.load(places + number, mask=number < count, other=-1) == place
        while tl.max(equal.to(tl.int32), axis=0) > 0:
            source = tl.load(order + number, mask=equal, other=0)
            some = rows + source[:, None] * rows_stride + column[None, :]
            sums += tl.sum(tl.load(some, mask=equal[:, None] & own[None, :], other=0.0).to(tl.float32), axis=0)
            number += ROWS
            equal = tl.load(places + number, mask=number < count, other=-1) == place
        tl.store(at, sums, mask=own)


def add_rows_(total: Tensor, rows: Tensor, places: Tensor, order: Tensor) -> None:
    rows = as_rows(rows)
    count, columns = rows.shape
    if places.shape != (count,) or order.shape != (count,) or total.shape[1] != columns or total.stride(1) != 1:
        raise ValueError(f"{tuple(rows.shape)} rows and {tuple(places.shape)} indices for a table {tuple(total.shape)}")
    if rows.numel():
        with on_device_of(total):
            add_rows_kernel[(count, triton.cdiv(columns, BLOCK))](
                total, rows, places, order, total.stride(0), rows.stride(0), count, columns,
                ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
