"""LayerNorm and RMSNorm.

Forward: a program normalises a few rows; a row beyond 8192 columns is read in tiles, twice (the second time from the
cache). Backward up to 8192 columns: as many programs as stay resident on the SMs walk over the rows, each with its
sums of the weight's gradient in registers, and write one partial sum a program at the end; the next rows are loaded
before the current ones are computed. Beyond 8192 columns those sums do not fit in registers, so one kernel makes the
gradient of the input row by row and another the weight's gradient column tile by column tile.

Sixteen elements a thread keep the backward kernel near 100 registers, so that 20 warps fit on an SM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.triton.common import as_rows, kept, on_device_of, processors

MOST_COLUMNS = 8192  # of a row that is held in registers
TILE = 2048  # columns a step of a longer row


@triton.jit
def norm_kernel(
    x, residual, row_keys, weight, bias, y, summed, mean, rstd,
    x_stride, residual_stride, rows, columns, eps, threshold, scale,
    RMS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DROP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    present = row < rows
    inside = present & (column < columns)
    v = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if DROP:
        v = tl.where(
            kept(tl.load(row_keys + row, mask=present, other=0), column, threshold), v * tl.cast(scale, tl.float32), 0.0
        )
    if HAS_RESIDUAL:
        v += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = v.to(summed.dtype.element_ty)
        tl.store(summed + row * columns + column, rounded, mask=inside)
        v = rounded.to(tl.float32)  # the backward pass sees what was stored
    count = tl.cast(columns, tl.float32)
    centred = v
    if not RMS:
        mu = tl.sum(v, axis=1, keep_dims=True) / count
        centred = tl.where(inside, v - mu, 0.0)
        tl.store(mean + row, mu, mask=present)
    r = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / count + tl.cast(eps, tl.float32))
    tl.store(rstd + row, r, mask=present)
    out = centred * r * tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_tiled_kernel(
    x, residual, row_keys, weight, bias, y, summed, mean, rstd,
    x_stride, residual_stride, columns, eps, threshold, scale,
    RMS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    count = tl.cast(columns, tl.float32)
    mu = 0.0
    squares = 0.0  # sum of squared distances from mu (of squares, for RMSNorm) over the columns so far
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        v = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        if DROP:
            v = tl.where(kept(tl.load(row_keys + row), column, threshold), v * tl.cast(scale, tl.float32), 0.0)
        if HAS_RESIDUAL:
            v += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
            rounded = v.to(summed.dtype.element_ty)
            tl.store(summed + row * columns + column, rounded, mask=inside)
            v = rounded.to(tl.float32)
        if RMS:
            squares += tl.sum(v * v, axis=0)
        else:
            # Chan, Golub and LeVeque 1979: two samples' means and squared distances, merged.
            here = tl.cast(tl.minimum(columns - start, BLOCK), tl.float32)
            tile_mu = tl.sum(v, axis=0) / here
            centred = tl.where(inside, v - tile_mu, 0.0)
            away = tile_mu - mu
            before = tl.cast(start, tl.float32)
            squares += tl.sum(centred * centred, axis=0) + away * away * before * here / (before + here)
            mu += away * here / (before + here)
    r = 1.0 / tl.sqrt(squares / count + tl.cast(eps, tl.float32))
    if not RMS:
        tl.store(mean + row, mu)
    tl.store(rstd + row, r)
    if HAS_RESIDUAL:
        tl.debug_barrier()  # a thread reads below what others stored above
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        if HAS_RESIDUAL:
            v = tl.load(summed + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        else:
            v = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        out = (v - mu) * r * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            out += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + row * columns + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    grad, grad_summed, summed, row_keys, weight, mean, rstd, out, dropped, partial,
    grad_stride, grad_summed_stride, summed_stride, rows, columns, threshold, scale,
    RMS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SUMMED: tl.constexpr, DROP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    own = column < columns
    count = tl.cast(columns, tl.float32)
    step = tl.num_programs(0) * ROWS
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    d_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    if PREFETCH:
        inside = (row < rows) & own
        next_g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0)
        next_v = tl.load(summed + row * summed_stride + column, mask=inside, other=0.0)
    for _ in range(tl.program_id(0) * ROWS, rows, step):
        present = row < rows
        inside = present & own
        if PREFETCH:
            g, v = next_g.to(tl.float32), next_v.to(tl.float32)
            ahead = (row + step < rows) & own
            next_g = tl.load(grad + (row + step) * grad_stride + column, mask=ahead, other=0.0)
            next_v = tl.load(summed + (row + step) * summed_stride + column, mask=ahead, other=0.0)
        else:
            g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(summed + row * summed_stride + column, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=present, other=0.0)
        if not RMS:
            v -= tl.load(mean + row, mask=present, other=0.0)
        unit = tl.where(inside, v * r, 0.0)
        d_weight += g * unit
        if HAS_BIAS:
            d_bias += g
        g *= tl.load(weight + column, mask=own, other=0.0).to(tl.float32)
        d = g - unit * (tl.sum(g * unit, axis=1, keep_dims=True) / count)
        if not RMS:
            d -= tl.sum(g, axis=1, keep_dims=True) / count
        d *= r
        if HAS_SUMMED:
            d += tl.load(grad_summed + row * grad_summed_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * columns + column, d.to(out.dtype.element_ty), mask=inside)
        if DROP:
            d = tl.where(
                kept(tl.load(row_keys + row, mask=present, other=0), column, threshold),
                d * tl.cast(scale, tl.float32),
                0.0,
            )
            tl.store(dropped + row * columns + column, d.to(out.dtype.element_ty), mask=inside)
        row += step
    # Sums of this program's rows; the row of `partial` is the program's.
    columns_1d = tl.arange(0, BLOCK)
    place = partial + tl.program_id(0).to(tl.int64) * columns + columns_1d
    tl.store(place, tl.sum(d_weight, axis=0), mask=columns_1d < columns)
    if HAS_BIAS:
        tl.store(
            place + tl.cast(tl.num_programs(0), tl.int64) * columns, tl.sum(d_bias, axis=0), mask=columns_1d < columns
        )


@triton.jit
def norm_backward_tiled_kernel(
    grad, grad_summed, summed, row_keys, weight, mean, rstd, out, dropped,
    grad_stride, grad_summed_stride, summed_stride, columns, threshold, scale,
    RMS: tl.constexpr, HAS_SUMMED: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    count = tl.cast(columns, tl.float32)
    r = tl.load(rstd + row)
    mu = 0.0
    if not RMS:
        mu = tl.load(mean + row)
    along = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        g *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(summed + row * summed_stride + column, mask=inside, other=0.0).to(tl.float32)
        along += g * (v - mu) * r
        total += g
    a = tl.sum(along, axis=0) / count
    b = tl.sum(total, axis=0) / count
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        g *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(summed + row * summed_stride + column, mask=inside, other=0.0).to(tl.float32)
        d = g - (v - mu) * r * a
        if not RMS:
            d -= b
        d *= r
        if HAS_SUMMED:
            d += tl.load(grad_summed + row * grad_summed_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * columns + column, d.to(out.dtype.element_ty), mask=inside)
        if DROP:
            d = tl.where(kept(tl.load(row_keys + row), column, threshold), d * tl.cast(scale, tl.float32), 0.0)
            tl.store(dropped + row * columns + column, d.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_weight_kernel(
    grad, summed, mean, rstd, partial, grad_stride, summed_stride, rows, columns,
    RMS: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    own = column < columns
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    d_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = tl.cast(start, tl.int64) + tl.arange(0, ROWS)[:, None]
        present = row < rows
        g = tl.load(grad + row * grad_stride + column, mask=present & own, other=0.0).to(tl.float32)
        v = tl.load(summed + row * summed_stride + column, mask=present & own, other=0.0).to(tl.float32)
        if not RMS:
            v -= tl.load(mean + row, mask=present, other=0.0)
        d_weight += g * v * tl.load(rstd + row, mask=present, other=0.0)
        d_bias += g
    columns_1d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = partial + tl.program_id(1).to(tl.int64) * columns + columns_1d
    tl.store(place, tl.sum(d_weight, axis=0), mask=columns_1d < columns)
    if HAS_BIAS:
        tl.store(
            place + tl.cast(tl.num_programs(1), tl.int64) * columns, tl.sum(d_bias, axis=0), mask=columns_1d < columns
        )


def norm(
    x: Tensor,
    residual: Tensor | None,
    row_keys: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    p: float,
    threshold: int,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fused, drop = residual is not None, row_keys is not None
    rows, base = as_rows(x), as_rows(residual) if residual is not None else None
    count, columns = rows.shape
    y = x.new_empty(x.shape)
    summed = x.new_empty(x.shape if fused else 0)
    mean = x.new_empty(0 if rms else count, dtype=torch.float32)
    rstd = x.new_empty(count, dtype=torch.float32)
    tensors = (rows, base, None if row_keys is None else row_keys.contiguous(), weight, bias, y, summed, mean, rstd)
    strides = (rows.stride(0), 0 if base is None else base.stride(0))
    if not y.numel():
        return y, summed, mean, rstd
    with on_device_of(x):
        if columns <= MOST_COLUMNS:
            block, tile_rows, warps = _tile(columns, 2048)
            norm_kernel[(triton.cdiv(count, tile_rows),)](
                *tensors, *strides, count, columns, eps, threshold, 1.0 / (1.0 - p),
                RMS=rms, HAS_BIAS=bias is not None, HAS_RESIDUAL=fused, DROP=drop,
                ROWS=tile_rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        else:
            norm_tiled_kernel[(count,)](
                *tensors, *strides, columns, eps, threshold, 1.0 / (1.0 - p),
                RMS=rms, HAS_BIAS=bias is not None, HAS_RESIDUAL=fused, DROP=drop, BLOCK=2 * TILE, num_warps=8,
            )  # fmt: skip
    return y, summed, mean, rstd


def norm_backward(
    grad: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    row_keys: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    p: float,
    threshold: int,
    rms: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    drop, more = row_keys is not None, grad_summed is not None
    out = summed.new_empty(summed.shape)
    dropped = summed.new_empty(summed.shape if drop else 0)
    grads, rows = as_rows(grad), as_rows(summed)
    also = as_rows(grad_summed) if grad_summed is not None else None
    count, columns = rows.shape
    sums = 2 if has_bias else 1
    if not out.numel():
        return out, dropped, rows.new_zeros((sums, columns), dtype=torch.float32)
    keys = None if row_keys is None else row_keys.contiguous()
    strides = (grads.stride(0), 0 if also is None else also.stride(0), rows.stride(0))
    flags = {"RMS": rms, "HAS_SUMMED": more, "DROP": drop}
    with on_device_of(summed):
        if columns <= MOST_COLUMNS:
            # Of many short rows 16 elements a thread would need more registers than there are.
            block, tile_rows, warps = _tile(columns, 2048 if columns > 256 else 1024)
            warps = max(4, warps)
            programs = min(triton.cdiv(count, tile_rows), processors(summed) * max(1, 16 // warps))
            # Registers for the next rows are there in half precision only, and not beside everything else at the
            # widest tile: Triton 3.7.1 spills 16 bytes there.
            prefetch = rows.dtype.itemsize == 2 and not (more and drop and block > 4096)
            partial = rows.new_empty((sums, programs, columns), dtype=torch.float32)
            norm_backward_kernel[(programs,)](
                grads, also, rows, keys, weight, mean, rstd, out, dropped, partial,
                *strides, count, columns, threshold, 1.0 / (1.0 - p),
                HAS_BIAS=has_bias, ROWS=tile_rows, BLOCK=block, num_warps=warps,
                PREFETCH=prefetch, **flags,
            )  # fmt: skip
        else:
            norm_backward_tiled_kernel[(count,)](
                grads, also, rows, keys, weight, mean, rstd, out, dropped,
                *strides, columns, threshold, 1.0 / (1.0 - p), BLOCK=TILE, num_warps=8, **flags,
            )  # fmt: skip
            tiles = triton.cdiv(columns, 512)
            programs = min(triton.cdiv(count, 8), max(1, processors(summed) * 4 // tiles))
            partial = rows.new_empty((sums, programs, columns), dtype=torch.float32)
            norm_weight_kernel[(tiles, programs)](
                grads, rows, mean, rstd, partial, grads.stride(0), rows.stride(0), count, columns,
                RMS=rms, HAS_BIAS=has_bias, ROWS=8, BLOCK=512, num_warps=8,
            )  # fmt: skip
    return out, dropped, partial.sum(1)


def _tile(columns: int, elements: int) -> tuple[int, int, int]:
    """Columns and rows of a program's tile of at least this many elements, and its warps: 16 elements a thread."""
    block = triton.next_power_of_2(columns)
    rows = max(1, elements // block)
    return block, rows, max(1, block * rows // 512)
