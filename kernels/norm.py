"""LayerNorm and RMSNorm over the last dim, alone or behind a dropout and a residual add.

Shapes: ``x [..., h]``, ``weight [h]``, ``bias [h]``; statistics are fp32 ``[rows]``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.kernels.autograd import first_derivative_only, main_gradients
from megatron_ds.kernels.column_sums import ColumnSums, with_bias_gradient
from megatron_ds.kernels.cpu.half_layer_norm import HalfLayerNorm, half_layer_norm
from megatron_ds.kernels.dropout import dropout_add, threshold
from megatron_ds.kernels.registry import Op, below_autograd, define

NORM = Op("norm", twin="norm", fuses=True)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` (Ba et al. 2016)."""
    if NORM.choose(x) == "triton":
        return torch.ops.megatron_ds.norm(x, None, None, weight, bias, None, eps, 0.0, False)[0]
    return layer_norm_reference(x, weight, bias, eps)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16):
        norm = HalfLayerNorm.apply if torch.is_grad_enabled() else half_layer_norm
        return norm(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` (Zhang and Sennrich 2019)."""
    if NORM.choose(x) == "triton":
        return torch.ops.megatron_ds.norm(x, None, None, weight, None, None, eps, 0.0, True)[0]
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In the weight's dtype, where that is wider than ``x``'s."""
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    kind: str = "layernorm",
    p: float = 0.0,
    row_keys: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The seam of two transformer sub-layers in one pass: ``summed = residual + dropout(x)``, then its norm.

    Args:
        kind: ``"layernorm"`` or ``"rmsnorm"``.
        p, row_keys: as in :func:`megatron_ds.kernels.dropout.dropout_add`.
        x_bias: ``[h]``, a bias that ``x`` has in it already, as in
            :func:`megatron_ds.kernels.column_sums.with_bias_gradient`.

    Returns:
        The norm of ``summed``, and ``summed`` itself, the next residual; both in the dtype that torch promotes ``x``
        and ``residual`` to.
    """
    if NORM.choose(x) == "triton":
        keys, p = (None, 0.0) if row_keys is None or p == 0.0 else (row_keys, p)
        y, summed, _, _ = torch.ops.megatron_ds.norm(x, residual, keys, weight, bias, x_bias, eps, p, kind == "rmsnorm")
        return y, summed
    summed = dropout_add(x if x_bias is None else with_bias_gradient(x, x_bias), residual, p, row_keys)
    if kind == "rmsnorm":
        return rms_norm_reference(summed, weight, eps), summed
    return layer_norm_reference(summed, weight, bias, eps), summed


class _Norm(torch.autograd.Function):
    """``rms`` norms have no mean and no bias; without a residual the second output is empty."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        row_keys: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        x_bias: Tensor | None,
        eps: float,
        p: float,
        rms: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with below_autograd():
            y, summed, mean, rstd = torch.ops.megatron_ds.norm(x, residual, row_keys, weight, bias, x_bias, eps, p, rms)
        ctx.save_for_backward(x if residual is None else summed, row_keys, weight, bias, x_bias, mean, rstd)
        ctx.main_grads = main_gradients(weight, bias, x_bias)
        ctx.p, ctx.rms = p, rms
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.fused = residual is not None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd, *(() if ctx.fused else (summed,)))
        return y, summed, mean, rstd

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, grad_summed = grads[:2]
        summed, row_keys, weight, bias, x_bias, mean, rstd = ctx.saved_tensors
        grad_summed = grad_summed if ctx.fused else None
        if grad is None:
            grad = torch.zeros_like(summed)
        with ColumnSums((weight, bias, x_bias), ctx.needs_input_grad[3:6], ctx.main_grads) as sums:
            d_summed, dropped = torch.ops.megatron_ds.norm_backward(
                grad, grad_summed, summed, row_keys, weight, mean, rstd, sums.totals, sums.keep, ctx.p, ctx.rms,
                bias is not None,
            )  # fmt: skip
        d_x = (d_summed if row_keys is None else dropped).to(ctx.dtypes[0])
        d_residual = d_summed.to(ctx.dtypes[1]) if ctx.fused else None
        return d_x, d_residual, None, *sums.gradients, None, None, None


def outputs(x: Tensor, residual: Tensor | None, rms: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the norm, the sum, the mean and the reciprocal deviation; empty for what there is not."""
    rows = x.numel() // x.shape[-1]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    summed = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    statistics = [x.new_empty(0 if no else rows, dtype=torch.float32) for no in (rms, False)]
    return x.new_empty(x.shape, dtype=dtype), summed, statistics[0], statistics[1]


def _norm_backward_fake(
    grad: Tensor, grad_summed: Tensor | None, summed: Tensor, row_keys: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    return summed.new_empty(summed.shape), summed.new_empty(0 if row_keys is None else summed.shape)


define(
    "norm(Tensor x, Tensor? residual, Tensor? row_keys, Tensor weight, Tensor? bias, Tensor? x_bias, float eps,"
    " float p, bool rms) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, residual, row_keys, weight, bias, x_bias, eps, p, rms: NORM.load(x).norm(
        x, residual, row_keys, weight, bias, eps, p, threshold(p), rms
    ),
    lambda x, residual, row_keys, weight, bias, x_bias, eps, p, rms: outputs(x, residual, rms),
    _Norm,
)
define(
    "norm_backward(Tensor grad, Tensor? grad_summed, Tensor summed, Tensor? row_keys, Tensor weight, Tensor mean,"
    " Tensor rstd, Tensor(a!)[] totals, bool[] keep, float p, bool rms, bool has_bias) -> (Tensor, Tensor)",
    lambda grad, grad_summed, summed, row_keys, weight, mean, rstd, totals, keep, p, rms, has_bias: NORM.load(
        summed
    ).norm_backward(
        grad, grad_summed, summed, row_keys, weight, mean, rstd, totals, keep, p, threshold(p), rms, has_bias
    ),
    _norm_backward_fake,
)
