"""The backward pass of LayerNorm and RMSNorm.

Up to 8192 columns as many programs as stay resident on the SMs walk over the rows, each with its column sums (the
gradients of weight and bias, and if wanted the sums of the input's gradient) in registers, and write one partial sum a
program at the end. Two rows are on their way into shared memory while one is computed, its statistics with it, and a
row's two dot products are one reduction.

Up to 16384 columns in half precision the sums still fit, but no row beside them: a row is taken in four parts, loaded
for its dot products and again, from the cache, for the gradients, so that memory is read once; but where a residual's
gradient or a dropout takes registers too, the bias's gradient is a sum of its own, which reads one tensor again. Wider
rows, and long ones in fp32, take two kernels that each read everything: one makes the gradient of the input row by row,
the other the weight's gradient column tile by column tile.

Partial sums go into the gradients, all of them, in one more launch (:mod:`.partial_sums`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.triton.common import STAGES, as_rows, kept, on_device_of, persistent, processors, sum_pair
from megatron_ds.kernels.triton.partial_sums import add_partial_sums, add_rows_to

MOST_COLUMNS = 8192  # of a row that is held in registers
MOST_SUMS = 16384  # columns whose weight gradients are summed in the registers of one program
TILE = 2048  # columns a step of a longer row


@triton.jit
def norm_backward_kernel(
    grad, grad_summed, summed, row_keys, weight, mean, rstd, out, dropped, partial,
    grad_stride, grad_summed_stride, summed_stride, rows, columns, threshold, scale,
    RMS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SUMMED: tl.constexpr, DROP: tl.constexpr, SUMS: tl.constexpr,
    HOLD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    own = column < columns
    if HOLD:
        w = tl.load(weight + column, mask=own, other=0.0)
    count = tl.cast(columns, tl.float32)
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    d_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        present = row < rows
        inside = present & own
        g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(summed + row * summed_stride + column, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=present, other=0.0)
        if not RMS:
            v -= tl.load(mean + row, mask=present, other=0.0)
        unit = tl.where(inside, v * r, 0.0)
        d_weight += g * unit
        if HAS_BIAS:
            d_bias += g
        if not HOLD:
            w = tl.load(weight + column, mask=own, other=0.0)
        g *= w.to(tl.float32)
        if RMS:
            d = (g - unit * (tl.sum(g * unit, axis=1, keep_dims=True) / count)) * r
        else:
            along, total = sum_pair(g * unit, g)
            d = (g - unit * (along / count) - total / count) * r
        if HAS_SUMMED:
            d += tl.load(grad_summed + row * grad_summed_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * columns + column, d.to(out.dtype.element_ty), mask=inside)
        if DROP:
            key = tl.load(row_keys + row, mask=present, other=0)
            d = tl.where(kept(key, column, threshold), d * tl.cast(scale, tl.float32), 0.0)
            tl.store(dropped + row * columns + column, d.to(out.dtype.element_ty), mask=inside)
        if SUMS:
            sums += tl.where(inside, d, 0.0)
    # Sums of this program's rows; the row of `partial` is the program's.
    columns_1d = tl.arange(0, BLOCK)
    place = partial + tl.program_id(0).to(tl.int64) * columns + columns_1d
    kind = tl.cast(tl.num_programs(0), tl.int64) * columns
    tl.store(place, tl.sum(d_weight, axis=0), mask=columns_1d < columns)
    if HAS_BIAS:
        place += kind
        tl.store(place, tl.sum(d_bias, axis=0), mask=columns_1d < columns)
    if SUMS:
        place += kind
        tl.store(place, tl.sum(sums, axis=0), mask=columns_1d < columns)


@triton.jit
def load_part(grad, summed, column, columns, AGAIN: tl.constexpr):
    """Gradient and input of a part of one row. ``AGAIN``: from the L2 cache, and not from registers, where the compiler
    would keep all parts of the row if both loads were alike."""
    inside = column < columns
    modifier: tl.constexpr = ".cg" if AGAIN else ""
    g = tl.load(grad + column, mask=inside, other=0.0, cache_modifier=modifier)
    return g, tl.load(summed + column, mask=inside, other=0.0, cache_modifier=modifier)


@triton.jit
def load_if(grad, summed, column, columns, g, v, NOW: tl.constexpr):
    """The same again, or what there is instead."""
    if NOW:
        g, v = load_part(grad, summed, column, columns, True)
    return g, v


@triton.jit
def units_of(v, mu, r, column, columns):
    """The normalised input of a part of one row."""
    return tl.where(column < columns, (v.to(tl.float32) - mu) * r, 0.0)


@triton.jit
def row_products(grad, summed, weight, mu, r, columns, BLOCK: tl.constexpr):
    """``[BLOCK]`` partial sums over a row of the gradient times the weight: with the normalised input, and alone."""
    products = tl.zeros((BLOCK,), tl.float32)
    gradients = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        g, v = load_part(grad, summed, column, columns, False)
        g = g.to(tl.float32) * tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
        products += g * units_of(v, mu, r, column, columns)
        gradients += g
    return products, gradients


@triton.jit
def part_gradient(
    d_weight, d_bias, g, v, grad_summed, row_key, weight, out, dropped, mu, r, along, total, column, columns,
    threshold, scale, RMS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SUMMED: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a part of one row and add to the sums of the weight's."""
    g, unit = g.to(tl.float32), units_of(v, mu, r, column, columns)
    d_weight += g * unit
    if HAS_BIAS:
        d_bias += g
    d = g * tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32) - unit * along
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
    c0 = tl.arange(0, BLOCK)
    c1, c2, c3 = BLOCK + c0, 2 * BLOCK + c0, 3 * BLOCK + c0
    nothing = tl.zeros((BLOCK,), tl.float32)
    w0, w1, w2, w3 = nothing, nothing, nothing, nothing
    b0, b1, b2, b3 = nothing, nothing, nothing, nothing
    count = tl.cast(columns, tl.float32)
    next_r, next_mu = tl.load(rstd + tl.program_id(0)), 0.0
    if not RMS:
        next_mu = tl.load(mean + tl.program_id(0))
    for number in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        r, mu = next_r, next_mu
        ahead = row + tl.num_programs(0)
        next_r = tl.load(rstd + ahead, mask=ahead < rows, other=0.0)
        if not RMS:
            next_mu = tl.load(mean + ahead, mask=ahead < rows, other=0.0)
        row_key = 0
        if DROP:
            row_key = tl.load(row_keys + row)
        own_grad, own = grad + row * grad_stride, summed + row * summed_stride
        also = grad_summed
        if HAS_SUMMED:
            also += row * grad_summed_stride
        to, to_dropped = out + row * columns, dropped + row * columns
        products, gradients = row_products(own_grad, own, weight, mu, r, columns, BLOCK)
        # The next part is on its way while one is computed, where there are registers for it.
        g0, v0 = load_part(own_grad, own, c0, columns, True)
        along, total = tl.sum(products, axis=0) / count, tl.sum(gradients, axis=0) / count
        g1, v1 = load_if(own_grad, own, c1, columns, g0, v0, not HAS_BIAS)
        w0, b0 = part_gradient(
            w0, b0, g0, v0, also, row_key, weight, to, to_dropped, mu, r, along, total, c0, columns,
            threshold, scale, RMS, HAS_BIAS, HAS_SUMMED, DROP,
        )  # fmt: skip
        g1, v1 = load_if(own_grad, own, c1, columns, g1, v1, HAS_BIAS)
        g2, v2 = load_if(own_grad, own, c2, columns, g1, v1, not HAS_BIAS)
        w1, b1 = part_gradient(
            w1, b1, g1, v1, also, row_key, weight, to, to_dropped, mu, r, along, total, c1, columns,
            threshold, scale, RMS, HAS_BIAS, HAS_SUMMED, DROP,
        )  # fmt: skip
        g2, v2 = load_if(own_grad, own, c2, columns, g2, v2, HAS_BIAS)
        g3, v3 = load_if(own_grad, own, c3, columns, g2, v2, not HAS_BIAS)
        w2, b2 = part_gradient(
            w2, b2, g2, v2, also, row_key, weight, to, to_dropped, mu, r, along, total, c2, columns,
            threshold, scale, RMS, HAS_BIAS, HAS_SUMMED, DROP,
        )  # fmt: skip
        g3, v3 = load_if(own_grad, own, c3, columns, g3, v3, HAS_BIAS)
        w3, b3 = part_gradient(
            w3, b3, g3, v3, also, row_key, weight, to, to_dropped, mu, r, along, total, c3, columns,
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
    totals: Sequence[Tensor],
    keep: Sequence[bool],
    p: float,
    threshold: int,
    rms: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of the sum, and through its dropout; ``totals``: of the weight, the bias, ``x_bias``, if any."""
    out = summed.new_empty(summed.shape)
    dropped = summed.new_empty(0 if row_keys is None else summed.shape)
    grads, rows = as_rows(grad), as_rows(summed)
    also = None if grad_summed is None else as_rows(grad_summed)
    keys = None if row_keys is None else row_keys.contiguous()
    if not out.numel():
        add_partial_sums(rows.new_empty((len(totals), 0, rows.shape[1]), dtype=torch.float32), totals, keep)
        return out, dropped
    tensors = (grads, also, rows, keys, weight.contiguous(), mean, rstd, out, dropped)
    with on_device_of(summed):
        partial = _launch(tensors, len(totals), threshold, 1.0 / (1.0 - p), rms, has_bias)
        made = partial.shape[0]
        add_partial_sums(partial, totals[:made], keep[:made])
        # The others, in the order of the totals.
        sources = [rows, *([grads] if has_bias else []), as_rows(out if keys is None else dropped)]
        for number in range(made, len(totals)):
            add_rows_to(totals[number], sources[number], keep[number])
    return out, dropped


def _launch(
    tensors: Sequence[Tensor | None], kinds: int, threshold: int, scale: float, rms: bool, has_bias: bool
) -> Tensor:
    """Write the gradients; returns ``[made, programs, columns]``, partial sums of the first ``made`` kinds."""
    grads, also, rows, keys, _, mean, rstd, *_ = tensors
    assert grads is not None and rows is not None and mean is not None and rstd is not None
    count, columns = rows.shape
    strides = (grads.stride(0), 0 if also is None else also.stride(0), rows.stride(0))
    flags = {"RMS": rms, "HAS_SUMMED": also is not None, "DROP": keys is not None}
    half, more = rows.dtype.itemsize == 2, also is not None or keys is not None
    if columns <= MOST_COLUMNS:
        tile = whole_row_tile(columns, rows.dtype.itemsize, kinds > 1 + has_bias or keys is not None)
        # The widest rows have no registers for everything at once.
        crowded = columns > 4096 and keys is not None
        made = 1 + has_bias if columns > 4096 and has_bias else kinds
        resident = _resident(tile, rms, also is not None, keys is not None)
        programs = persistent(rows, triton.cdiv(count, tile["ROWS"]), tile["num_warps"], resident)
        partial = rows.new_empty((made, programs, columns), dtype=torch.float32)
        norm_backward_kernel[(programs,)](
            *tensors, partial, *strides, count, columns, threshold, scale,
            HAS_BIAS=has_bias, SUMS=made > 1 + has_bias, HOLD=not crowded, **tile, **flags,
        )  # fmt: skip
    elif columns <= MOST_SUMS and half:
        made = 1 if more else 1 + has_bias
        programs = min(count, processors(rows))
        partial = rows.new_empty((made, programs, columns), dtype=torch.float32)
        norm_backward_parts_kernel[(programs,)](
            *tensors, partial, *strides, count, columns, threshold, scale,
            HAS_BIAS=made == 2, BLOCK=MOST_SUMS // 4, num_warps=16, **flags,
        )  # fmt: skip
    else:
        norm_backward_tiled_kernel[(count,)](
            *tensors, *strides, columns, threshold, scale, BLOCK=TILE, num_warps=8, **flags
        )
        partial = _parameter_sums(grads, rows, mean, rstd, rms, has_bias)
    return partial


def whole_row_tile(columns: int, itemsize: int, more: bool) -> dict[str, int]:
    """Of the kernel that holds whole rows: 8 elements a thread, or 16 in wide rows where there is not ``more`` to hold
    than the gradients of weight and bias."""
    block = triton.next_power_of_2(columns)
    elements = max(block, 2048 if block <= 512 else 1024)
    warps = max(1, min(elements // 256, 16 if block > 4096 or more else 8))
    stages = STAGES if elements * itemsize <= 16384 else 2
    return {"ROWS": elements // block, "BLOCK": block, "num_warps": warps, "STAGES": stages}


def _resident(tile: dict[str, int], rms: bool, summed: bool, dropped: bool) -> int:
    """Warps of that kernel that an SM has registers for."""
    block = tile["BLOCK"]
    crowded = not rms and tile["num_warps"] == 8 and (dropped or (summed and block <= 512))
    return 16 if block > 2048 or block in (256, 512) or crowded else 24


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
