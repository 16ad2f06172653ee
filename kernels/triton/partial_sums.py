"""Partial sums of several programs, added up into gradients: the one launch behind a kernel that makes column sums.

Each program of such a kernel leaves a row of sums; adding those with torch, casting and adding the result to a
gradient would be three launches a tensor, as long as the kernel itself where a model is small.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.triton.common import on_device_of

TILE = 2048  # numbers that a program adds at a time
MOST_TOTALS = 3


@triton.jit
def partial_sums_kernel(
    partial, total_0, total_1, total_2, keep, programs, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    kind = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = column < columns
    place = partial + tl.cast(kind, tl.int64) * programs * columns + column[None, :]
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        sums += tl.load(place + tl.cast(row, tl.int64) * columns, mask=(row < programs) & own[None, :], other=0.0)
    total = total_0
    if kind == 1:
        total = total_1
    if kind == 2:
        total = total_2
    result = tl.sum(sums, axis=0)
    if (keep >> kind) % 2 == 1:
        result += tl.load(total + column, mask=own, other=0.0).to(tl.float32)
    tl.store(total + column, result.to(total.dtype.element_ty), mask=own)


def add_partial_sums(partial: Tensor, totals: Sequence[Tensor], keep: Sequence[bool]) -> None:
    """``totals[i] += partial[i].sum(0)`` where ``keep[i]``, else ``=``.

    Args:
        partial: ``[len(totals), programs, columns]`` fp32, contiguous.
        totals: ``[columns]`` each, contiguous, of one dtype; in another than fp32 the sum is rounded once.
    """
    kinds, programs, columns = partial.shape
    for total in totals:
        if total.numel() != columns or not total.is_contiguous() or total.dtype != totals[0].dtype:
            raise ValueError(f"{columns} column sums do not go into {tuple(total.shape)} {total.dtype}")
    if kinds > MOST_TOTALS:
        raise ValueError(f"{kinds} sums at once; at most {MOST_TOTALS}")
    if columns:
        bits = sum(1 << number for number, own in enumerate(keep) if own)
        block = 128 if columns >= 8192 else 32  # enough programs for all SMs
        with on_device_of(partial):
            partial_sums_kernel[(triton.cdiv(columns, block), kinds)](
                partial, totals[0], totals[1 % kinds], totals[2 % kinds], bits, programs, columns,
                ROWS=TILE // block, BLOCK=block, num_warps=4,
            )  # fmt: skip


def add_rows_to(total: Tensor, rows: Tensor, keep: bool) -> None:
    """The same of rows whose sum no kernel has made."""
    sums = rows.sum(0, dtype=total.dtype)
    if keep:
        total.add_(sums)
    else:
        total.copy_(sums)
