"""The sum of squares of a flat buffer, for the norm of gradients. Not differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ds.kernels.registry import Op, define

SQUARE_SUM = Op("square_sum", twin="square_sum")

_NORM_ROW = 4096


def square_sum(flat: Tensor) -> Tensor:
    """0-d float64 sum of squares of ``flat [n]``, in one pass at memory speed."""
    if SQUARE_SUM.choose(flat) == "triton":
        return torch.ops.megatron_ds.square_sum(flat)
    return square_sum_reference(flat)


def square_sum_reference(flat: Tensor) -> Tensor:
    """``vector_norm`` adds fp32 squares in fp32: of many numbers it comes out too small, and asking it for float64 is
    slow. Norms of short rows, added in float64, are right to 1e-8 at the same speed."""
    whole = flat.numel() // _NORM_ROW * _NORM_ROW
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    if whole:
        total += torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_ROW), dim=1).double().square().sum()
    if whole < flat.numel():
        total += torch.linalg.vector_norm(flat[whole:]).double().square()
    return total


define(
    "square_sum(Tensor flat) -> Tensor",
    lambda flat: SQUARE_SUM.load(flat).square_sum(flat),
    lambda flat: flat.new_empty((), dtype=torch.float64),
)
