"""LayerNorm and RMSNorm, forward; the backward pass is in :mod:`.norm_backward`.

As many programs as stay resident on the SMs walk over the rows, a few at a time, while the next ones are on their way
into shared memory. A row beyond 16384 columns is read in tiles, twice (the second time from the cache).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.norm import outputs
from megatron_ds.kernels.triton.common import STAGES, as_rows, kept, on_device_of, persistent, sum_pair
from megatron_ds.kernels.triton.norm_backward import TILE, norm_backward

__all__ = ["norm", "norm_backward"]

MOST_COLUMNS = 16384  # of a row that is held in registers
RESIDENT_WARPS = 24


@triton.jit
def first_of_rows(x, residual, row, x_stride, residual_stride, rows, HAS_RESIDUAL: tl.constexpr):
    """The first element of each row, before any dropout."""
    v = tl.load(x + row * x_stride, mask=row < rows, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        v += tl.load(residual + row * residual_stride, mask=row < rows, other=0.0).to(tl.float32)
    return v


@triton.jit
def norm_kernel(
    x, residual, row_keys, weight, bias, y, summed, mean, rstd,
    x_stride, residual_stride, rows, columns, eps, threshold, scale,
    RMS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DROP: tl.constexpr, ONCE: tl.constexpr,
    HOLD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    own = column < columns
    if HOLD:
        w = tl.load(weight + column, mask=own, other=0.0)
        if HAS_BIAS:
            b = tl.load(bias + column, mask=own, other=0.0)
    count = tl.cast(columns, tl.float32)
    step = tl.num_programs(0) * ROWS
    first = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    if ONCE:
        next_near = first_of_rows(x, residual, first, x_stride, residual_stride, rows, HAS_RESIDUAL)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        present = row < rows
        inside = present & own
        v = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        if DROP:
            key = tl.load(row_keys + row, mask=present, other=0)
            v = tl.where(kept(key, column, threshold), v * tl.cast(scale, tl.float32), 0.0)
        if HAS_RESIDUAL:
            v += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
            rounded = v.to(summed.dtype.element_ty)
            tl.store(summed + row * columns + column, rounded, mask=inside)
            v = rounded.to(tl.float32)  # the backward pass sees what was stored
        if RMS:
            squares = tl.sum(v * v, axis=1, keep_dims=True)
        elif ONCE:
            # Both sums at once, of distances from a number of the row's own magnitude: a squared mean is not taken
            # from a mean of squares that it almost equals. Half precision cannot tell the difference.
            near = next_near
            next_near = first_of_rows(x, residual, row + step, x_stride, residual_stride, rows, HAS_RESIDUAL)
            v = tl.where(inside, v - near, 0.0)
            total, squares = sum_pair(v, v * v)
            away = total / count
            squares = tl.maximum(squares - away * total, 0.0)
            v -= away
            tl.store(mean + row, near + away, mask=present)
        else:
            mu = tl.sum(v, axis=1, keep_dims=True) / count
            v = tl.where(inside, v - mu, 0.0)
            squares = tl.sum(v * v, axis=1, keep_dims=True)
            tl.store(mean + row, mu, mask=present)
        r = 1.0 / tl.sqrt(squares / count + tl.cast(eps, tl.float32))
        tl.store(rstd + row, r, mask=present)
        if not HOLD:
            w = tl.load(weight + column, mask=own, other=0.0)
            if HAS_BIAS:
                b = tl.load(bias + column, mask=own, other=0.0)
        out = v * r * w.to(tl.float32)
        if HAS_BIAS:
            out += b.to(tl.float32)
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
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    made = outputs(x, residual, rms)
    dtype = made[0].dtype
    tensors = (rows, base, None if row_keys is None else row_keys.contiguous(), weight, bias, *made)
    strides = (rows.stride(0), 0 if base is None else base.stride(0))
    if not x.numel():
        return made
    with on_device_of(x):
        if columns <= MOST_COLUMNS:
            block, tile_rows, warps = tile_of(columns, 2048)
            # The widest rows beside a dropout have no registers for the weights, nor wide numbers shared memory.
            hold = not (drop and block > 8192 and dtype.itemsize == 2)
            stages = STAGES if block * tile_rows * (x.itemsize + (0 if base is None else base.itemsize)) < 65536 else 2
            # Triton 3.6 gives LayerNorm of a sum beside a dropout so many registers that a third less fit.
            resident = RESIDENT_WARPS if rms or not drop else RESIDENT_WARPS * 2 // 3
            norm_kernel[(persistent(x, triton.cdiv(count, tile_rows), warps, resident),)](
                *tensors, *strides, count, columns, eps, threshold, 1.0 / (1.0 - p),
                RMS=rms, HAS_BIAS=bias is not None, HAS_RESIDUAL=fused, DROP=drop, ONCE=not rms and dtype.itemsize == 2,
                HOLD=hold, ROWS=tile_rows, BLOCK=block, STAGES=stages, num_warps=warps,
            )  # fmt: skip
        else:
            norm_tiled_kernel[(count,)](
                *tensors, *strides, columns, eps, threshold, 1.0 / (1.0 - p),
                RMS=rms, HAS_BIAS=bias is not None, HAS_RESIDUAL=fused, DROP=drop, BLOCK=2 * TILE, num_warps=8,
            )  # fmt: skip
    return made


def tile_of(columns: int, elements: int) -> tuple[int, int, int]:
    """Columns and rows of a tile of at least this many elements, and its warps: 16 elements a thread, or up to 32."""
    block = triton.next_power_of_2(columns)
    rows = max(1, elements // block)
    return block, rows, max(1, min(16, block * rows // 512))
