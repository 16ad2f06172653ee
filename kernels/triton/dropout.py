"""Dropout by counters, with an optional residual: one read of each input, one write, no mask in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.triton.common import as_rows, elementwise_tile, kept, on_device_of


@triton.jit
def dropout_add_kernel(
    x, residual, row_keys, out, x_stride, residual_stride, rows, features, threshold, scale,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < features)
    value = tl.load(x + row * x_stride + column, mask=inside).to(tl.float32)
    value = tl.where(
        kept(tl.load(row_keys + row, mask=row < rows, other=0), column, threshold),
        value * tl.cast(scale, tl.float32),
        0.0,
    )
    if HAS_RESIDUAL:
        value += tl.load(residual + row * residual_stride + column, mask=inside).to(tl.float32)
    tl.store(out + row * features + column, value.to(out.dtype.element_ty), mask=inside)


def dropout_add(x: Tensor, residual: Tensor | None, row_keys: Tensor, p: float, threshold: int) -> Tensor:
    out = x.new_empty(x.shape, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    rows, base = as_rows(x), None if residual is None else as_rows(residual)
    if out.numel():
        grid, tile = elementwise_tile(rows.shape[0], rows.shape[1], 2048)
        with on_device_of(x):
            dropout_add_kernel[grid](
                rows, base, row_keys.contiguous(), out, rows.stride(0), 0 if base is None else base.stride(0),
                *rows.shape, threshold, 1.0 / (1.0 - p), HAS_RESIDUAL=base is not None, **tile,
            )  # fmt: skip
    return out
