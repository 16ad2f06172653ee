"""SwiGLU, GeGLU and bias-GELU: each reads its inputs once and writes its result once.

A program takes a block of columns of one row, or a few short rows, so that column numbers need no division.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.triton.common import STAGES, activate, as_rows, elementwise_tile, on_device_of, persistent
from megatron_ds.kernels.triton.partial_sums import add_partial_sums

GATED_TILE = 4096  # faster than 1024 on an H200, where the other kernels lose

SUMS_BLOCK, SUMS_TILE, SUMS_WARPS = 256, 2048, 4  # of a strip whose columns are summed
RESIDENT_WARPS = 24


@triton.jit
def gated_kernel(x, out, x_stride, rows, features, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < features)
    gate = tl.load(x + row * x_stride + column, mask=inside).to(tl.float32)
    up = tl.load(x + row * x_stride + features + column, mask=inside).to(tl.float32)
    value, _ = activate(gate, KIND)
    # torch rounds between the two operations; so do we, that both agree to the last place in half precision.
    value = value.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * features + column, (value * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward_kernel(
    grad, x, out, grad_stride, x_stride, rows, features, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < features)
    g = tl.load(grad + row * grad_stride + column, mask=inside).to(tl.float32)
    gate = tl.load(x + row * x_stride + column, mask=inside).to(tl.float32)
    up = tl.load(x + row * x_stride + features + column, mask=inside).to(tl.float32)
    value, slope = activate(gate, KIND)
    first = out + row * 2 * features + column
    tl.store(first, (g * up * slope).to(out.dtype.element_ty), mask=inside)
    tl.store(first + features, (g * value).to(out.dtype.element_ty), mask=inside)


@triton.jit
def bias_gelu_kernel(
    x, bias, out, x_stride, rows, features,
    HAS_BIAS: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < features)
    v = tl.load(x + row * x_stride + column, mask=inside).to(tl.float32)
    if HAS_BIAS:
        v += tl.load(bias + column, mask=column < features).to(tl.float32)
    value, _ = activate(v, KIND)
    tl.store(out + row * features + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def bias_gelu_backward_kernel(
    grad, x, bias, out, grad_stride, x_stride, rows, features,
    HAS_BIAS: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < features)
    g = tl.load(grad + row * grad_stride + column, mask=inside).to(tl.float32)
    v = tl.load(x + row * x_stride + column, mask=inside).to(tl.float32)
    if HAS_BIAS:
        v += tl.load(bias + column, mask=column < features).to(tl.float32)
    _, slope = activate(v, KIND)
    tl.store(out + row * features + column, (g * slope).to(out.dtype.element_ty), mask=inside)


@triton.jit
def bias_gelu_sums_kernel(
    grad, x, bias, out, partial, grad_stride, x_stride, rows, features,
    HAS_BIAS: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same, and its column sums: a program walks down a strip of columns, a few rows at a time."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    own = column < features
    if HAS_BIAS:
        b = tl.load(bias + column, mask=own, other=0.0)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & own
        g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            v += b.to(tl.float32)
        _, slope = activate(v, KIND)
        sums += g * slope
        tl.store(out + row * features + column, (g * slope).to(out.dtype.element_ty), mask=inside)
    column_1d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = partial + tl.program_id(1).to(tl.int64) * features + column_1d
    tl.store(place, tl.sum(sums, axis=0), mask=column_1d < features)


def gated(x: Tensor, activation: str) -> Tensor:
    features = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], features))
    rows = as_rows(x)
    if out.numel():
        grid, tile = elementwise_tile(rows.shape[0], features, GATED_TILE)
        with on_device_of(x):
            gated_kernel[grid](rows, out, rows.stride(0), rows.shape[0], features, KIND=activation, **tile)
    return out


def gated_backward(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    features = x.shape[-1] // 2
    out = x.new_empty(x.shape)
    rows, grads = as_rows(x), as_rows(grad)
    if out.numel():
        grid, tile = elementwise_tile(rows.shape[0], features, GATED_TILE)
        with on_device_of(x):
            gated_backward_kernel[grid](
                grads, rows, out, grads.stride(0), rows.stride(0), rows.shape[0], features, KIND=activation, **tile
            )
    return out


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    out = x.new_empty(x.shape)
    rows, bias = as_rows(x), None if bias is None else bias.contiguous()
    if out.numel():
        grid, tile = elementwise_tile(*rows.shape)
        with on_device_of(x):
            bias_gelu_kernel[grid](
                rows, bias, out, rows.stride(0), *rows.shape, HAS_BIAS=bias is not None, KIND=_gelu(approximate), **tile
            )
    return out


def bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, totals: Sequence[Tensor], keep: Sequence[bool], approximate: str
) -> Tensor:
    out = x.new_empty(x.shape)
    rows, grads, bias = as_rows(x), as_rows(grad), None if bias is None else bias.contiguous()
    count, features = rows.shape
    strides, flags = (grads.stride(0), rows.stride(0)), {"HAS_BIAS": bias is not None, "KIND": _gelu(approximate)}
    with on_device_of(x):
        if totals:
            block = min(triton.next_power_of_2(max(features, 1)), SUMS_BLOCK)
            tall, strips = SUMS_TILE // block, triton.cdiv(features, block)
            walks = persistent(x, triton.cdiv(count, tall), SUMS_WARPS, RESIDENT_WARPS, strips) if out.numel() else 0
            partial = rows.new_empty((1, walks, features), dtype=torch.float32)
            if walks:
                bias_gelu_sums_kernel[(strips, walks)](
                    grads, rows, bias, out, partial, *strides, count, features,
                    ROWS=tall, BLOCK=block, STAGES=STAGES, num_warps=SUMS_WARPS, **flags,
                )  # fmt: skip
            add_partial_sums(partial, totals, keep)
        elif out.numel():
            grid, tile = elementwise_tile(count, features)
            bias_gelu_backward_kernel[grid](grads, rows, bias, out, *strides, count, features, **flags, **tile)
    return out


def _gelu(approximate: str) -> str:
    return "gelu_tanh" if approximate == "tanh" else "gelu"
