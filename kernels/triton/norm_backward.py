"""The backward pass of LayerNorm and RMSNorm.

Up to 8192 columns as many programs as stay resident on the SMs walk over the rows, each with its sums of the weight's
gradient in registers, and write one partial sum a program at the end; the next rows are loaded before the current ones
are computed. Sixteen elements a thread keep that kernel near 100 registers, so that 20 warps fit on an SM.

Up to 16384 columns in half precision the sums still fit, but no row beside them: a row is taken in four parts, loaded
for its dot products and again, from the cache, for the gradients, so that memory is read once; but where a residual's
gradient or a dropout takes registers too, the bias's gradient is a sum of its own, which reads one tensor again. Wider
rows, and long ones in fp32, take two kernels that each read everything: one makes the gradient of the input row by row,
the other the weight's gradient column tile by column tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.triton.common import as_rows, kept, on_device_of, processors

MOST_COLUMNS = 8192  # of a row that is held in registers
MOST_SUMS = 16384  # columns whose weight gradients are summed in the registers of one program
TILE = 2048  # columns a step of a longer row


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
def load_part(grad, summed, weight, mu, r, column, columns):
    """Gradient and normalised input of a part of one row, and the weight."""
    inside = column < columns
    g = tl.load(grad + column, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(summed + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    return g, tl.where(inside, (v - mu) * r, 0.0), w


@triton.jit
def part_gradient(
    d_weight, d_bias, grad, grad_summed, summed, row_key, weight, out, dropped, mu, r, along, total, column, columns,
    threshold, scale, RMS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SUMMED: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a part of one row and add to the sums of the weight's."""
    # Without the barrier the compiler keeps what it loaded before, in registers that are not there.
    tl.debug_barrier()
    g, unit, w = load_part(grad, summed, weight, mu, r, column, columns)
    d_weight += g * unit
    if HAS_BIAS:
        d_bias += g
    d = g * w - unit * along
    if not RMS:
        d -= total
    d *= r
    if HAS_SUMMED:
        d += tl.load(grad_summed + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(out + column, d.to(out.dtype.element_ty), mask=column < columns)
    if DROP:
        d = tl.where(kept(row_key, column, threshold), d * tl.cast(scale, tl.float32), 0.0)
        tl.store(dropped + column, d.to(out.dtype.element_ty), mask=column < columns)
    return d_weight, d_bias


@triton.jit
def store_parts(place, p0, p1, p2, p3, columns, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.store(place + column, p0, mask=column < columns)
    tl.store(place + BLOCK + column, p1, mask=BLOCK + column < columns)
    tl.store(place + 2 * BLOCK + column, p2, mask=2 * BLOCK + column < columns)
    tl.store(place + 3 * BLOCK + column, p3, mask=3 * BLOCK + column < columns)


@triton.jit
def norm_backward_parts_kernel(
    grad, grad_summed, summed, row_keys, weight, mean, rstd, out, dropped, partial,
    grad_stride, grad_summed_stride, summed_stride, rows, columns, threshold, scale,
    RMS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SUMMED: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ahead: tl.constexpr = 1 if HAS_BIAS else 2
    c0 = tl.arange(0, BLOCK)
    c1, c2, c3 = BLOCK + c0, 2 * BLOCK + c0, 3 * BLOCK + c0
    nothing = tl.zeros((BLOCK,), tl.float32)
    w0, w1, w2, w3 = nothing, nothing, nothing, nothing
    b0, b1, b2, b3 = nothing, nothing, nothing, nothing
    count = tl.cast(columns, tl.float32)
    for number in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        r = tl.load(rstd + row)
        mu = 0.0
        if not RMS:
            mu = tl.load(mean + row)
        row_key = 0
        if DROP:
            row_key = tl.load(row_keys + row)
        own_grad, own = grad + row * grad_stride, summed + row * summed_stride
        also = grad_summed
        if HAS_SUMMED:
            also += row * grad_summed_stride
        to, to_dropped = out + row * columns, dropped + row * columns
        products, gradients = nothing, nothing
        for start in range(0, columns, ahead * BLOCK):
            # Loads of two parts are under way at once; for all four there are no registers, and beside the bias's sums
            # not for two.
            for part in tl.static_range(ahead):
                g, unit, w = load_part(own_grad, own, weight, mu, r, start + part * BLOCK + c0, columns)
                products += g * w * unit
                gradients += g * w
        along, total = tl.sum(products, axis=0) / count, tl.sum(gradients, axis=0) / count
        w0, b0 = part_gradient(
            w0, b0, own_grad, also, own, row_key, weight, to, to_dropped, mu, r, along, total, c0, columns,
            threshold, scale, RMS, HAS_BIAS, HAS_SUMMED, DROP,
        )  # fmt: skip
        w1, b1 = part_gradient(
            w1, b1, own_grad, also, own, row_key, weight, to, to_dropped, mu, r, along, total, c1, columns,
            threshold, scale, RMS, HAS_BIAS, HAS_SUMMED, DROP,
        )  # fmt: skip
        w2, b2 = part_gradient(
            w2, b2, own_grad, also, own, row_key, weight, to, to_dropped, mu, r, along, total, c2, columns,
            threshold, scale, RMS, HAS_BIAS, HAS_SUMMED, DROP,
        )  # fmt: skip
        w3, b3 = part_gradient(
            w3, b3, own_grad, also, own, row_key, weight, to, to_dropped, mu, r, along, total, c3, columns,
            threshold, scale, RMS, HAS_BIAS, HAS_SUMMED, DROP,
        )  # fmt: skip
    place = partial + tl.program_id(0).to(tl.int64) * columns
    store_parts(place, w0, w1, w2, w3, columns, BLOCK)
    if HAS_BIAS:
        store_parts(place + tl.cast(tl.num_programs(0), tl.int64) * columns, b0, b1, b2, b3, columns, BLOCK)


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
    keys, weight = None if row_keys is None else row_keys.contiguous(), weight.contiguous()
    strides = (grads.stride(0), 0 if also is None else also.stride(0), rows.stride(0))
    flags = {"RMS": rms, "HAS_SUMMED": more, "DROP": drop}
    with on_device_of(summed):
        if columns <= MOST_COLUMNS:
            tile = _whole_row_tile(columns, rows.dtype.itemsize == 2, more and drop, has_bias)
            programs = min(triton.cdiv(count, tile["ROWS"]), processors(summed) * max(1, 16 // tile["num_warps"]))
            partial = rows.new_empty((sums, programs, columns), dtype=torch.float32)
            norm_backward_kernel[(programs,)](
                grads, also, rows, keys, weight, mean, rstd, out, dropped, partial,
                *strides, count, columns, threshold, 1.0 / (1.0 - p), HAS_BIAS=has_bias, **tile, **flags,
            )  # fmt: skip
        elif columns <= MOST_SUMS and rows.dtype.itemsize == 2:
            apart = has_bias and (more or drop)
            programs = min(count, processors(summed))
            partial = rows.new_empty((1 if apart else sums, programs, columns), dtype=torch.float32)
            norm_backward_parts_kernel[(programs,)](
                grads, also, rows, keys, weight, mean, rstd, out, dropped, partial,
                *strides, count, columns, threshold, 1.0 / (1.0 - p),
                HAS_BIAS=has_bias and not apart, BLOCK=MOST_SUMS // 4, num_warps=16, **flags,
            )  # fmt: skip
            if apart:
                bias = grads.sum(0, keepdim=True, dtype=torch.float32)
                return out, dropped, torch.cat([partial.sum(1), bias])
        else:
            norm_backward_tiled_kernel[(count,)](
                grads, also, rows, keys, weight, mean, rstd, out, dropped,
                *strides, columns, threshold, 1.0 / (1.0 - p), BLOCK=TILE, num_warps=8, **flags,
            )  # fmt: skip
            partial = _parameter_sums(grads, rows, mean, rstd, rms, has_bias)
    return out, dropped, partial.sum(1)


def _whole_row_tile(columns: int, half: bool, crowded: bool, has_bias: bool) -> dict[str, int]:
    """Of the kernel that holds whole rows; ``crowded``: it has a summed gradient and dropout to hold besides."""
    # Of many short rows 16 elements a thread would need more registers than there are.
    block, rows, warps = tile_of(columns, 2048 if columns > 256 else 1024)
    # Registers for the next rows are there in half precision only, and not beside everything else at the widest tiles:
    # Triton 3.7.1 spills 8 to 16 bytes there.
    prefetch = half and not (crowded and block > (2048 if has_bias else 4096))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(4, warps), "PREFETCH": prefetch}


def _parameter_sums(grads: Tensor, rows: Tensor, mean: Tensor, rstd: Tensor, rms: bool, has_bias: bool) -> Tensor:
    """``[1 or 2, programs, columns]``: each program's part of the gradients of weight and bias."""
    count, columns = rows.shape
    tiles = triton.cdiv(columns, 512)
    programs = min(triton.cdiv(count, 8), max(1, processors(rows) * 4 // tiles))
    partial = rows.new_empty((2 if has_bias else 1, programs, columns), dtype=torch.float32)
    norm_weight_kernel[(tiles, programs)](
        grads, rows, mean, rstd, partial, grads.stride(0), rows.stride(0), count, columns,
        RMS=rms, HAS_BIAS=has_bias, ROWS=8, BLOCK=512, num_warps=8,
    )  # fmt: skip
    return partial


def tile_of(columns: int, elements: int) -> tuple[int, int, int]:
    """Columns and rows of a tile of at least this many elements, and its warps: 16 elements a thread, or up to 32."""
    block = triton.next_power_of_2(columns)
    rows = max(1, elements // block)
    return block, rows, max(1, min(16, block * rows // 512))
