"""Dropout whose decisions are computed from counters, alone or added to a residual.

Nothing is stored: an element is kept or dropped by a hash of its row's key and its column, so the backward pass (and
a recomputed forward pass, and another mesh) finds the same decisions again. Row keys come from
``megatron_ds.rng.DropoutKeys``. Shapes: ``[..., h]`` elements, ``[...]`` row keys.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron_ds.kernels.registry import Op, below_autograd, define

DROPOUT_ADD = Op("dropout_add", twin="dropout", fuses=True)

# Every column has a key of its own: its number times 2^32 / golden ratio, modulo 2^32 (Knuth's multiplicative hash).
COLUMN_STEP = 0x9E3779B1

Int32 = TypeVar("Int32", Tensor, np.ndarray)


def mix(x: Int32) -> Int32:
    """A bijective scrambling of int32 values ("lowbias32" of C. Wellons' hash prospector search, bias 0.17)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -2073254261  # 0x846CA68B as int32
    return x ^ ((x >> 16) & 0xFFFF)


def keep_mask(row_keys: Tensor, columns: Tensor, p: float) -> Tensor:
    """``[..., len(columns)]`` bool: True where the element is kept, with probability ``1 - p``.

    ``row_keys`` ``[...]`` int32 identifies the row, ``columns`` int64 the element within it.
    """
    bits = mix(row_keys.unsqueeze(-1) + (columns * COLUMN_STEP).to(torch.int32))
    return (bits & 0x7FFFFFFF) >= threshold(p)


def threshold(p: float) -> int:
    """The smallest 31-bit hash that is kept."""
    return round(p * 0x80000000)


def dropout_add(x: Tensor, residual: Tensor | None, p: float, row_keys: Tensor | None) -> Tensor:
    """``residual + dropout(x)``, or ``dropout(x)`` where there is no residual.

    Args:
        x, residual: ``[..., h]``; the result has the dtype that torch promotes both to.
        p: probability of dropping an element; those kept are scaled by ``1 / (1 - p)``.
        row_keys: ``[...]`` int32; None: nothing is dropped.
    """
    if row_keys is None or p == 0.0:
        return x if residual is None else residual + x
    if DROPOUT_ADD.choose(x) == "triton":
        return torch.ops.megatron_ds.dropout_add(x, residual, row_keys, p)
    return dropout_add_reference(x, residual, p, row_keys)


def dropout_add_reference(x: Tensor, residual: Tensor | None, p: float, row_keys: Tensor) -> Tensor:
    mask = keep_mask(row_keys, torch.arange(x.shape[-1], device=x.device), p)
    kept = x * (mask.to(x.dtype) / (1.0 - p))
    return kept if residual is None else residual + kept


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, row_keys: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(row_keys)
        ctx.p, ctx.dtype = p, x.dtype
        with below_autograd():
            return torch.ops.megatron_ds.dropout_add(x, residual, row_keys, p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (row_keys,) = ctx.saved_tensors
        # The gradient drops what the forward pass dropped: the same operator.
        dropped = (
            torch.ops.megatron_ds.dropout_add(grads[0], None, row_keys, ctx.p).to(ctx.dtype)
            if ctx.needs_input_grad[0]
            else None
        )
        return dropped, grads[0] if ctx.needs_input_grad[1] else None, None, None


define(
    "dropout_add(Tensor x, Tensor? residual, Tensor row_keys, float p) -> Tensor",
    lambda x, residual, row_keys, p: DROPOUT_ADD.load(x).dropout_add(x, residual, row_keys, p, threshold(p)),
    lambda x, residual, row_keys, p: x.new_empty(
        x.shape, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    ),
    _DropoutAdd,
)
