"""A backward pass of autograd from one output, with a given gradient of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


def run_backward(output: Tensor | GradientEdge, grad: Tensor, retain_graph: bool = False) -> None:
    """What ``torch.autograd.backward(output, grad)`` runs.

    To compare two shapes, that imports sympy: 500 modules that stay in the memory of every rank, in the first step.
    Autograd's engine compares them by itself.
    """
    run = torch.autograd.graph._engine_run_backward
    run((output,), (grad,), retain_graph, False, (), allow_unreachable=True, accumulate_grad=True)
