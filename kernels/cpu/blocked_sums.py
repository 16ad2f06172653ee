"""Sums over tokens on a CPU, by blocks of rows that stay in the cache while they are converted to fp32."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 20
_BLOCK_ROWS = 256


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """``total += left @ right`` of half precision (``first``: ``=``), whose product has no fp32 output on a CPU.

    The same bits as the product as a whole, which with the copy of it in the dtype of ``total`` that torch adds from
    took 18 MiB for an 8192 x 384 table.
    """
    rows = max(1, _BLOCK_BYTES // max(1, right.shape[1] * right.itemsize))
    for some, sums in zip(left.split(rows), total.split(rows)):
        product = some @ right
        sums.copy_(product) if first else sums.add_(product)


def add_rows(total: Tensor, indices: Tensor, rows: Tensor) -> None:
    """``total[indices[i]] += rows[i]``; indices may repeat."""
    for places, some in zip(indices.split(_BLOCK_ROWS), rows.split(_BLOCK_ROWS)):
        total.index_add_(0, places, some.to(total.dtype))


def sum_rows(x: Tensor) -> Tensor:
    """The sum of the rows of ``[n, columns]``, in fp32."""
    total = x.new_zeros(x.shape[1], dtype=torch.float32)
    for some in x.split(2 * _BLOCK_ROWS):
        total += some.sum(0, dtype=torch.float32)
    return total
