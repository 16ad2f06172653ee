"""Replicated linear layers: every tensor-parallel rank computes them whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.linear import column_linear, replicated_parameter
from megatron_ds.layers.recipe import OwnPrecision, Recipe
from megatron_ds.mesh import Axis


@dataclass
class Products:
    """Linear product without collectives, whose weight gradient is added straight to the main gradient.

    ``x [..., in] -> [..., out]`` by a weight ``[..., in]`` and its bias. With ``F.linear`` autograd would make the
    gradient first and add it afterwards. No FP8 recipe takes its place.
    """

    tp: Axis = field(default_factory=lambda: Axis("tp"))
    sequence_parallel: bool = False
    recipe: Recipe = field(default_factory=OwnPrecision)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return F.linear(x, weight.flatten(0, -2), bias.flatten())
        return column_linear(x, weight, bias, self)


class Affine(nn.Module):
    """A linear layer that every tensor-parallel rank holds whole.

    Args:
        partial: each rank's gradient is a share that is summed over tp.
        std: of initial weights; 0 starts them at zero. Default: Xavier's.
    """

    def __init__(self, name: str, inputs: int, outputs: int, std: float | None = None, *, partial: bool, **where: Any):
        super().__init__()
        tp = where.pop("tp")
        std = (2 / (inputs + outputs)) ** 0.5 if std is None else std
        shape, init = (outputs, inputs), "normal" if std else "zeros"
        self.weight = replicated_parameter(
            f"{name}.weight", shape, init, tp, partial, weight_decay=True, std=std, **where
        )
        self.bias = replicated_parameter(f"{name}.bias", (outputs,), "zeros", tp, partial, **where)
        self.products = Products()

    def forward(self, x: Tensor) -> Tensor:
        return self.products(x, self.weight, self.bias)
