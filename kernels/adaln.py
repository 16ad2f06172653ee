"""adaLN (adaptive layer norm, Peebles and Xie 2023, section 3.2) by operators that read a stream once.

Shapes: ``s`` sequence, ``b`` batch, ``h`` hidden; streams are ``[s, b, h]``, shifts, scales and gates ``[b, h]``.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ds.kernels.autograd import first_derivative_only
from megatron_ds.kernels.registry import Op, define

ADALN = Op("adaln", twin="adaln", fuses=True)
MOST_BYTES = 16384
"""Of a row that the kernels hold in registers."""


class Operators(Protocol):
    """Fused operators of adaLN: Triton kernels (:data:`FUSED`), or compiled graphs for a CPU."""

    def norm(
        self, x: Tensor, shift: Tensor, scale: Tensor, branch: Tensor | None, gate: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        """The norm, mean and reciprocal deviation of each row; with a branch also the sum ``x + branch gate``."""

    def norm_backward(
        self,
        grad: Tensor,
        d_summed: Tensor,
        summed: Tensor,
        mean: Tensor,
        rstd: Tensor,
        scale: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Gradients of the stream, of shift and of scale; with a branch also of that and of its gate."""

    def scaled_add_backward(self, grad: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """Of ``x + y scale``: the gradients of ``y`` and of ``scale``."""


class _Fused:
    """The Triton kernels. What there is with a branch alone comes empty without one."""

    def norm(self, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.megatron_ds.modulated_norm(*arguments))

    def norm_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.megatron_ds.modulated_norm_backward(*arguments))

    def scaled_add_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.megatron_ds.scaled_add_backward(*arguments))


FUSED: Operators = _Fused()


def fused_for(x: Tensor) -> Operators | None:
    """The Triton kernels, where the op says so and a row fits."""
    return FUSED if x.shape[-1] * x.itemsize <= MOST_BYTES and ADALN.choose(x) == "triton" else None


def modulated_norm(
    operators: Operators,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    branch: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`megatron_ds.layers.modulation.modulated_norm`, with gradients of all columns."""
    found: tuple[Tensor, Tensor] = _ModulatedNorm.apply(operators, x, shift, scale, eps, branch, gate)
    return found


class _ModulatedNorm(torch.autograd.Function):
    """Keeps the stream, from which the backward pass makes the normed values again while it has them in registers."""

    @staticmethod
    def forward(
        ctx: Any,
        operators: Operators,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        eps: float,
        branch: Tensor | None,
        gate: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out, mean, rstd, *of_sum = operators.norm(x, shift, scale, branch, gate, eps)
        summed = x.view_as(x) if branch is None else of_sum[0]
        ctx.save_for_backward(summed, mean, rstd, scale, branch, gate)
        ctx.operators = operators
        return out, summed

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_shift, d_scale, *of_sum = ctx.operators.norm_backward(*grads, *ctx.saved_tensors)
        return None, d_x, d_shift, d_scale, None, *((None, None) if ctx.saved_tensors[-1] is None else of_sum)


def _fake_norm(x: Tensor, shift: Tensor, scale: Tensor, branch: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(x.dtype, scale.dtype)
    mean, rstd = (x.new_empty(x.shape[0] * x.shape[1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), mean, rstd, x.new_empty(0 if branch is None else x.shape, dtype=dtype)


def _fake_norm_backward(
    grad: Tensor, d_summed: Tensor, summed: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, *of_sum: Tensor | None
) -> tuple[Tensor, ...]:
    branch, gate = (of[:0] if given is None else given for of, given in zip((summed, scale), of_sum))
    return tuple(like.new_empty(like.shape) for like in (summed, scale, scale, branch, gate))


define(
    "modulated_norm(Tensor x, Tensor shift, Tensor scale, Tensor? branch, Tensor? gate, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, *others: ADALN.load(x).modulated_norm(x, *others),
    _fake_norm,
)
define(
    "modulated_norm_backward(Tensor grad, Tensor d_summed, Tensor summed, Tensor mean, Tensor rstd, Tensor scale, "
    "Tensor? branch, Tensor? gate) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda grad, *others: ADALN.load(grad).modulated_norm_backward(grad, *others),
    _fake_norm_backward,
)
define(
    "scaled_add_backward(Tensor grad, Tensor y, Tensor scale) -> (Tensor, Tensor)",
    lambda grad, *others: ADALN.load(grad).scaled_add_backward(grad, *others),
    lambda grad, y, scale: (y.new_empty(y.shape), scale.new_empty(scale.shape)),
)
