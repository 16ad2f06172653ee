"""LayerNorm on a CPU in half precision: torch's own sums the gradients of its weights in that precision.

Shapes: ``x [..., h]``, ``weight [h]``, ``bias [h]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ds.kernels.autograd import first_derivative_only

_BLOCK_ELEMENTS = 1024 * 384  # converted to fp32 at a time


class HalfLayerNorm(torch.autograd.Function):
    """torch's forward pass, and a backward pass that adds up in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = _normed(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        d_x, d_weight, d_bias = layer_norm_gradients(grads[0], x, weight, bias, mean, rstd)
        return d_x, d_weight.to(weight.dtype), None if bias is None or d_bias is None else d_bias.to(bias.dtype), None


def half_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The forward pass alone."""
    return _normed(x, weight, bias, eps)[0]


def _normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, and fp32 mean and reciprocal deviation of each row."""
    return torch.native_layer_norm(x, weight.shape, weight.float(), None if bias is None else bias.float(), eps)


def layer_norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``x [..., h]``, ``weight`` and ``bias`` (``[h]``, fp32).

    torch's kernel, twice: on half precision for that of ``x``, which it computes in fp32, and for those of the weights
    on blocks of rows in fp32. ``mean`` and ``rstd`` ``[..., 1]`` are the forward pass's, in fp32.
    """
    backward = torch.ops.aten.native_layer_norm_backward
    wide, wide_bias = weight.float(), None if bias is None else bias.float()
    d_x = backward(grad, x, weight.shape, mean, rstd, wide, wide_bias, [True, False, False])[0]
    columns = x.shape[-1]
    rows = grad.reshape(-1, columns), x.reshape(-1, columns), mean.reshape(-1, 1), rstd.reshape(-1, 1)
    d_weight = weight.new_zeros(columns, dtype=torch.float32)
    d_bias = None if bias is None else torch.zeros_like(d_weight)
    block = max(1, _BLOCK_ELEMENTS // max(1, columns))
    buffers = x.new_empty(2, min(block, rows[0].shape[0]), columns, dtype=torch.float32)
    for g, v, mu, r in zip(*(t.split(block) for t in rows)):
        wide_rows = [to[: len(of)].copy_(of) for to, of in zip(buffers, (g, v))]
        _, w, b = backward(*wide_rows, weight.shape, mu, r, wide, wide_bias, [False, True, bias is not None])
        d_weight += w
        if d_bias is not None:
            d_bias += b
    return d_x, d_weight, d_bias
