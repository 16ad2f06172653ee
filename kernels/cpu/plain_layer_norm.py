"""Layer norm without weights, as adaLN needs it."""

from __future__ import annotations

import torch
from torch import Tensor


def plain_layer_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``layer_norm(x)``, and mean and reciprocal deviation of each row.

    On a CPU torch's kernel is vectorised only where it has weights: ones and zeros give the same bits in half the time.
    """
    shape, weight, bias = x.shape[-1:], None, None
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        weight, bias = x.new_ones(shape), x.new_zeros(shape)
    return torch.native_layer_norm(x, shape, weight, bias, eps)
