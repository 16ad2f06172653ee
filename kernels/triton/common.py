"""What several Triton kernels share: rows of a tensor, launch sizes, activations, the dropout hash.

Kernels load any of fp32, fp16 and bf16 and compute in fp32. Constants of a kernel are ``tl.constexpr``, because a
Python float arrives as fp64 and takes the arithmetic with it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

STAGES = 3
"""Rows or tiles of a walking kernel that are under way at once: loads of the next two fill shared memory meanwhile."""


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def processors(x: Tensor) -> int:
    """Streaming multiprocessors of the tensor's device; under the interpreter a number that tests can reason with."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 2


def persistent(x: Tensor, tiles: int, warps: int, resident: int, strips: int = 1) -> int:
    """Programs of a kernel that walk over ``tiles``, so many that ``resident`` warps an SM are busy with all strips.

    None has more than one tile less than another.
    """
    most = max(1, processors(x) * max(1, resident // warps) // strips)
    return triton.cdiv(tiles, triton.cdiv(tiles, most))


def elementwise_tile(rows: int, columns: int, elements: int = 1024) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid of an elementwise kernel and its tile of so many elements: a part of a row, or several short rows.

    1024 elements are 8 a thread of 4 warps, one 128-bit load in half precision.
    """
    block = min(triton.next_power_of_2(columns), elements)
    tall = elements // block
    return (triton.cdiv(rows, tall), triton.cdiv(columns, block)), {"ROWS": tall, "BLOCK": block}


def as_rows(x: Tensor) -> Tensor:
    """``[..., n]`` as ``[rows, n]`` with neighbouring columns side by side; a copy only where no view will do."""
    x = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def unit_stride(x: Tensor) -> Tensor:
    """``x`` with stride 1 in its last dim; a copy only where it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def sum_pair(a, b):
    """Row sums ``[rows, 1]`` of two ``[rows, columns]``, by one reduction: the threads meet once."""
    return tl.split(tl.sum(tl.join(a, b), axis=1, keep_dims=True))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, KIND: tl.constexpr):
    """Value and slope of silu, gelu (erf) or gelu_tanh at fp32 ``x``."""
    if KIND == "silu":
        s = sigmoid(x)
        value = x * s
        slope = s * (1.0 + x * (1.0 - s))
    elif KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        value = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        tl.static_assert(KIND == "gelu_tanh")
        # 0.5 (1 + tanh u) is sigmoid(2 u), and so needs no tanh.
        s = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        value = x * s
        slope = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return value, slope


@triton.jit
def kept(row_key, column, threshold):
    """``megatron_ds.kernels.dropout.keep_mask``: True where the element of this row key and column stays."""
    bits = row_key.to(tl.uint32, bitcast=True) + column.to(tl.uint32) * 0x9E3779B1
    bits = bits ^ (bits >> 16)
    bits = bits * 0x7FEB352D
    bits = bits ^ (bits >> 15)
    bits = bits * 0x846CA68B
    bits = bits ^ (bits >> 16)
    return (bits & 0x7FFFFFFF).to(tl.int32, bitcast=True) >= threshold
