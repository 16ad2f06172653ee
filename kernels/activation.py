"""Gated and biased activations between the two matmuls of an MLP.

Shapes: ``[..., f]`` features; a gated input is ``[..., 2 f]``, gate first (Shazeer 2020).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.kernels.autograd import first_derivative_only
from megatron_ds.kernels.registry import Op, below_autograd, define

GATED = Op("gated", twin="activation")
BIAS_GELU = Op("bias_gelu", twin="activation")

# Activation of the gate, by the name of the layer that it makes.
SILU, GELU, GELU_TANH = "silu", "gelu", "gelu_tanh"


def gated(x: Tensor, activation: str = SILU) -> Tensor:
    """``activation(gate) * up`` of ``x = [gate, up]`` ``[..., 2 f]`` -> ``[..., f]``: SwiGLU, or GeGLU.

    ``activation``: ``"silu"``, ``"gelu"`` (erf) or ``"gelu_tanh"``.
    """
    if GATED.choose(x) == "triton":
        return torch.ops.megatron_ds.gated(x, activation)
    return gated_reference(x, activation)


def gated_reference(x: Tensor, activation: str = SILU) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return _activate(gate, activation) * up


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """``gelu(x + bias)``: ``[..., f]``, ``[f]`` or None; ``approximate`` as in ``torch.nn.functional.gelu``."""
    if BIAS_GELU.choose(x) == "triton":
        return torch.ops.megatron_ds.bias_gelu(x, bias, approximate)
    return bias_gelu_reference(x, bias, approximate)


def bias_gelu_reference(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == SILU:
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == GELU_TANH else "none")


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        with below_autograd():
            return torch.ops.megatron_ds.gated(x, activation)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return torch.ops.megatron_ds.gated_backward(grads[0], x, ctx.activation), None


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.approximate = approximate
        with below_autograd():
            return torch.ops.megatron_ds.bias_gelu(x, bias, approximate)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        grad = torch.ops.megatron_ds.bias_gelu_backward(grads[0], x, bias, ctx.approximate)
        # A column sum of what was just written; torch's own reduction is at the copy rate already.
        return grad, None if bias is None else grad.sum(tuple(range(grad.dim() - 1))).to(bias.dtype), None


define(
    "gated(Tensor x, str activation) -> Tensor",
    lambda x, activation: GATED.load(x).gated(x, activation),
    lambda x, activation: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
    _Gated,
)
define(
    "gated_backward(Tensor grad, Tensor x, str activation) -> Tensor",
    lambda grad, x, activation: GATED.load(x).gated_backward(grad, x, activation),
    lambda grad, x, activation: x.new_empty(x.shape),
)
define(
    "bias_gelu(Tensor x, Tensor? bias, str approximate) -> Tensor",
    lambda x, bias, approximate: BIAS_GELU.load(x).bias_gelu(x, bias, approximate),
    lambda x, bias, approximate: x.new_empty(x.shape),
    _BiasGelu,
)
define(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias, str approximate) -> Tensor",
    lambda grad, x, bias, approximate: BIAS_GELU.load(x).bias_gelu_backward(grad, x, bias, approximate),
    lambda grad, x, bias, approximate: x.new_empty(x.shape),
)
