"""Gated and biased activations between the two matmuls of an MLP.

Shapes: ``[..., f]`` features; a gated input is ``[..., 2 f]``, gate first (Shazeer 2020).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.kernels.autograd import first_derivative_only, main_gradients
from megatron_ds.kernels.column_sums import ColumnSums, with_bias_gradient
from megatron_ds.kernels.registry import Op, below_autograd, define

GATED = Op("gated", twin="activation", fuses=True)
BIAS_GELU = Op("bias_gelu", twin="activation", fuses=True)

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


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none", *, added: bool = False) -> Tensor:
    """``gelu(x + bias)``: ``[..., f]``, ``[f]`` or None; ``approximate`` as in ``torch.nn.functional.gelu``.

    ``added``: ``x`` has the bias in it already, as in :func:`megatron_ds.kernels.column_sums.with_bias_gradient`.
    """
    if BIAS_GELU.choose(x) == "triton":
        return torch.ops.megatron_ds.bias_gelu(x, bias, approximate, added)
    if added and bias is not None:
        return bias_gelu_reference(with_bias_gradient(x, bias), None, approximate)
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
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, approximate: str, added: bool) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.main_grads = main_gradients(bias)
        ctx.approximate, ctx.added = approximate, added
        with below_autograd():
            return torch.ops.megatron_ds.bias_gelu(x, bias, approximate, added)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        given = None if ctx.added else bias
        with ColumnSums((bias,), ctx.needs_input_grad[1:2], ctx.main_grads) as sums:
            grad = torch.ops.megatron_ds.bias_gelu_backward(grads[0], x, given, sums.totals, sums.keep, ctx.approximate)
        return grad, sums.gradients[0], None, None


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
    "bias_gelu(Tensor x, Tensor? bias, str approximate, bool added) -> Tensor",
    lambda x, bias, approximate, added: BIAS_GELU.load(x).bias_gelu(x, None if added else bias, approximate),
    lambda x, *others: x.new_empty(x.shape),
    _BiasGelu,
)
define(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias, Tensor(a!)[] totals, bool[] keep, str approximate)"
    " -> Tensor",
    lambda grad, x, *others: BIAS_GELU.load(x).bias_gelu_backward(grad, x, *others),
    lambda grad, x, *others: x.new_empty(x.shape),
)
