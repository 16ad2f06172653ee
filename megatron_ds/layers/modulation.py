"""adaLN: shifts, scales and gates of a block from a condition, split over the tensor-parallel axis.

Shapes: ``s`` sequence, ``b`` batch, ``h`` hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.kernels.autograd import first_derivative_only
from megatron_ds.kernels.cpu.plain_layer_norm import plain_layer_norm
from megatron_ds.layers.affine import Products
from megatron_ds.mesh import Axis
from megatron_ds.shard import ShardedDim, ShardSpec, empty_parameter


class Modulation(nn.Module):
    """``[b, h] -> count x [b, h]``, one linear layer whose outputs are split over tp and gathered.

    The weight is a third of a diffusion transformer's; the gathered outputs are ``count / s`` of an activation. The
    input's gradient is a rank's share alone: what made the condition sums its gradients over tp (``partial``).

    Args:
        partial: each tensor-parallel rank applies the outputs to its part of the sequence.
        std: of initial weights; 0 is adaLN-Zero, which makes every block the identity.
    """

    def __init__(
        self,
        name: str,
        size: int,
        count: int,
        *,
        tp: Axis,
        partial: bool,
        std: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.tp, self.partial, self.count = tp, partial, count
        split = (ShardedDim.over(tp, 1),)
        weight = ShardSpec(f"{name}.weight", (count, size, size), split, init="normal" if std else "zeros", std=std)
        bias = ShardSpec(f"{name}.bias", (count, size), split, init="zeros", weight_decay=False)
        self.weight = empty_parameter(weight, device, dtype)
        self.bias = empty_parameter(bias, device, dtype)
        self.products = Products()

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        own = self.products(condition, self.weight, self.bias)  # [b, count * h / tp]
        if self.tp.size == 1:
            return own.view(condition.shape[0], self.count, -1).unbind(1)
        whole = comm.gather_from_region(own.unsqueeze(0), self.tp, self.partial)  # [tp, b, count * h / tp]
        parts = whole.view(self.tp.size, condition.shape[0], self.count, -1).permute(2, 1, 0, 3)
        return parts.reshape(self.count, condition.shape[0], -1).unbind(0)


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, branch: Tensor | None = None, gate: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """adaLN of the residual stream: ``layer_norm(x) (1 + scale) + shift``, without weights, and ``x`` itself.

    With a ``branch`` and its ``gate``, ``x + branch gate`` stands for ``x``. Whoever goes on with the stream takes it
    from here: its gradient is then added by the operator that makes the norm's.

    Args:
        x, branch: ``[s, b, h]``; shift, scale, gate: ``[b, h]``.
    """
    if torch.compiler.is_compiling():
        x = x if branch is None or gate is None else torch.addcmul(x, branch, gate)
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale), x
    if not torch.is_grad_enabled():
        x = x if branch is None or gate is None else torch.addcmul(x, branch, gate)
        return torch.addcmul(shift, plain_layer_norm(x, eps)[0], 1 + scale), x
    found: tuple[Tensor, Tensor] = _ModulatedNorm.apply(x, shift, scale, eps, branch, gate)
    return found


class _ModulatedNorm(torch.autograd.Function):
    """Keeps the normed values and not the stream: of those, as its argument, torch's layer norm has the same gradient
    but for the factor ``rstd`` of each row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float, branch: Tensor | None, gate: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = x.view_as(x) if branch is None or gate is None else torch.addcmul(x, branch, gate)
        normed, _, rstd = plain_layer_norm(x, eps)
        scale = 1 + scale
        ctx.save_for_backward(normed, rstd, scale, branch, gate)
        ctx.set_materialize_grads(False)
        return torch.addcmul(shift, normed, scale), x

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        normed, rstd, scale, branch, gate = ctx.saved_tensors
        grad, d_x = grads
        d_shift = d_scale = None
        if grad is not None:
            d_shift, d_scale = grad.sum(0), (grad * normed).sum(0)
            backward = torch.ops.aten.native_layer_norm_backward
            statistics = torch.zeros_like(rstd), torch.ones_like(rstd)
            d_normed = (grad * scale).to(normed.dtype)
            centred = backward(d_normed, normed, normed.shape[-1:], *statistics, None, None, [True, False, False])[0]
            del d_normed  # whose memory what follows takes
            rstd = rstd.to(normed.dtype)
            d_x = centred.mul_(rstd) if d_x is None else torch.addcmul(d_x, centred, rstd)
        of_branch = (None, None) if d_x is None or branch is None else (d_x * gate, (d_x * branch).sum(0))
        return d_x, d_shift, d_scale, None, *of_branch


def scaled_add(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """``x + y scale``: ``x, y [s, b, h]``, ``scale [b, h]``."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return torch.addcmul(x, y, scale)
    out: Tensor = _ScaledAdd.apply(x, y, scale)
    return out


class _ScaledAdd(torch.autograd.Function):
    """``torch.addcmul``, whose backward pass would also multiply each factor by its ``value`` of 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(y, scale)
        return torch.addcmul(x, y, scale)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, scale = ctx.saved_tensors
        (grad,) = grads
        return grad, grad * scale, (grad * y).sum(0)
