"""adaLN: shifts, scales and gates of a block from a condition, split over the tensor-parallel axis.

Shapes: ``s`` sequence, ``b`` batch, ``h`` hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.kernels import adaln
from megatron_ds.kernels.adaln import Operators
from megatron_ds.kernels.autograd import first_derivative_only
from megatron_ds.kernels.cpu.compiled_modulation import CompiledModulation
from megatron_ds.kernels.cpu.plain_layer_norm import plain_layer_norm
from megatron_ds.layers.affine import Products
from megatron_ds.mesh import Axis
from megatron_ds.shard import ShardedDim, ShardSpec, empty_parameter

ALL = slice(None)


class Modulation(nn.Module):
    """``[b, h] -> count x [b, h]``, one linear layer whose outputs are split over tp and gathered.

    The weight is a third of a diffusion transformer's; the gathered outputs are ``count / s`` of an activation. The
    input's gradient is a rank's share alone: what made the condition sums its gradients over tp (``partial``).

    Args:
        partial: each tensor-parallel rank applies the outputs to its part of the sequence.
        std: of initial weights; 0 is adaLN-Zero, which makes every block the identity.

    Attributes:
        columns: of the outputs, those whose gradients this rank needs: all, or where every rank has the whole sequence
            the ones that its weights make. Of the others the gradients need not be right.
        compiled: graphs of the operators, for training on a CPU.
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
        width = size // tp.size
        self.compiled: CompiledModulation | None = None
        self.columns = ALL if partial or tp.size == 1 else slice(tp.rank * width, (tp.rank + 1) * width)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        own = self.products(condition, self.weight, self.bias)  # [b, count * h / tp]
        if self.tp.size == 1:
            return own.view(condition.shape[0], self.count, -1).unbind(1)
        if self.partial:
            whole = comm.gather_from_region(own.unsqueeze(0), self.tp)  # [tp, b, count * h / tp]
            return _outputs(whole, self.count)
        gathered: tuple[Tensor, ...] = _Gathered.apply(own, self.tp, self.count, self.columns)
        return gathered

    def norm(
        self,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        eps: float,
        branch: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:func:`modulated_norm` by what :meth:`forward` gave."""
        return modulated_norm(x, shift, scale, eps, branch, gate, self.columns, self._graphs_for(x))

    def add(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """:func:`scaled_add` by what :meth:`forward` gave."""
        return scaled_add(x, y, gate, self.columns, self._graphs_for(x))

    def _graphs_for(self, x: Tensor) -> CompiledModulation | None:
        return self.compiled if self.compiled is not None and self.compiled.takes(x) else None


def _outputs(whole: Tensor, count: int) -> tuple[Tensor, ...]:
    """``[tp, b, count * h / tp] -> count x [b, h]``."""
    ranks, b, _ = whole.shape
    return whole.view(ranks, b, count, -1).permute(2, 1, 0, 3).reshape(count, b, -1).unbind(0)


class _Gathered(torch.autograd.Function):
    """All-gather of the outputs over tp. In the backward pass a rank has the whole gradient, and takes its columns."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, tp: Axis, count: int, columns: slice) -> tuple[Tensor, ...]:
        ctx.columns = columns
        return _outputs(comm.gather_dim0(own.unsqueeze(0), tp).wait(), count)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return torch.stack([grad[:, ctx.columns] for grad in grads], 1).flatten(1), None, None, None


def _over_tokens(x: Tensor, y: Tensor | None, columns: slice, buffer: Tensor | None = None) -> Tensor:
    """The sum of ``x`` or of ``x y``, ``[s, b, h] -> [b, h]``, zero outside of ``columns``; overwrites ``buffer``."""
    if columns == ALL:
        return (x if y is None else _product(x, y, buffer)).sum(0)
    terms = x[..., columns] if y is None else _product(x[..., columns], y[..., columns], buffer)
    total = terms.new_zeros(x.shape[1:])
    torch.sum(terms, 0, out=total[:, columns])
    return total


def _product(x: Tensor, y: Tensor, buffer: Tensor | None) -> Tensor:
    """``x y`` in the memory of ``buffer`` if that has the dtype, as a CPU has it in its cache, unlike new memory."""
    if buffer is None or not buffer.is_contiguous() or buffer.dtype != torch.result_type(x, y):
        return x * y
    if buffer.shape != x.shape:
        buffer = buffer.view(-1)[: x.numel()].view(x.shape)
    return torch.mul(x, y, out=buffer)


def modulated_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    columns: slice = ALL,
    operators: Operators | None = None,
) -> tuple[Tensor, Tensor]:
    """adaLN of the residual stream: ``layer_norm(x) (1 + scale) + shift``, without weights, and ``x`` itself.

    With a ``branch`` and its ``gate``, ``x + branch gate`` stands for ``x``. Whoever goes on with the stream takes it
    from here: its gradient is then added by the operator that makes the norm's.

    Args:
        x, branch: ``[s, b, h]``; shift, scale, gate: ``[b, h]``.
        columns: of ``shift``, ``scale`` and ``gate``, for their gradients, see :class:`Modulation`.
        operators: what computes, with gradients of all columns; None: Triton, or torch's operators.
    """
    operators = operators or adaln.fused_for(x)
    if operators is not None:
        return adaln.modulated_norm(operators, x, shift, scale, eps, branch, gate)
    if torch.compiler.is_compiling():
        x = x if branch is None or gate is None else torch.addcmul(x, branch, gate)
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale), x
    if not torch.is_grad_enabled():
        x = x if branch is None or gate is None else torch.addcmul(x, branch, gate)
        return torch.addcmul(shift, plain_layer_norm(x, eps)[0], 1 + scale), x
    found: tuple[Tensor, Tensor] = _ModulatedNorm.apply(x, shift, scale, eps, branch, gate, columns)
    return found


class _ModulatedNorm(torch.autograd.Function):
    """Keeps the normed values and not the stream: of those, as its argument, torch's layer norm has the same gradient
    but for the factor ``rstd`` of each row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        eps: float,
        branch: Tensor | None,
        gate: Tensor | None,
        columns: slice,
    ) -> tuple[Tensor, Tensor]:
        x = x.view_as(x) if branch is None or gate is None else torch.addcmul(x, branch, gate)
        normed, _, rstd = plain_layer_norm(x, eps)
        scale = 1 + scale
        ctx.save_for_backward(normed, rstd, scale, branch, gate)
        ctx.set_materialize_grads(False)
        ctx.columns = columns
        return torch.addcmul(shift, normed, scale), x

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        normed, rstd, scale, branch, gate = ctx.saved_tensors
        grad, d_x = grads
        d_shift = d_scale = buffer = None
        if grad is not None:
            buffer = grad * scale
            backward = torch.ops.aten.native_layer_norm_backward
            statistics = torch.zeros_like(rstd), torch.ones_like(rstd)
            arguments = buffer.to(normed.dtype), normed, normed.shape[-1:], *statistics, None, None
            centred = backward(*arguments, [True, False, False])[0]
            d_shift, d_scale = (_over_tokens(grad, of, ctx.columns, buffer) for of in (None, normed))
            rstd = rstd.to(normed.dtype)
            d_x = centred.mul_(rstd) if d_x is None else torch.addcmul(d_x, centred, rstd, out=centred)
        d_branch = d_gate = None
        if d_x is not None and branch is not None:
            d_gate = _over_tokens(d_x, branch, ctx.columns, buffer)
            d_branch = _product(d_x, gate, buffer)
        return d_x, d_shift, d_scale, None, d_branch, d_gate, None


def scaled_add(x: Tensor, y: Tensor, scale: Tensor, columns: slice = ALL, operators: Operators | None = None) -> Tensor:
    """``x + y scale``: ``x, y [s, b, h]``, ``scale [b, h]``; ``columns``, of ``scale``, as above.

    ``operators``: what makes the gradients, those of all columns; None: Triton, or torch's operators.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return torch.addcmul(x, y, scale)
    out: Tensor = _ScaledAdd.apply(x, y, scale, columns, operators or adaln.fused_for(x))
    return out


class _ScaledAdd(torch.autograd.Function):
    """``torch.addcmul``, whose backward pass would also multiply each factor by its ``value`` of 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, columns: slice, operators: Operators | None) -> Tensor:
        ctx.save_for_backward(y, scale)
        ctx.columns, ctx.operators = columns, operators
        return torch.addcmul(x, y, scale)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, scale = ctx.saved_tensors
        (grad,) = grads
        if ctx.operators is not None:
            return grad, *ctx.operators.scaled_add_backward(grad, y, scale), None, None
        buffer = torch.empty_like(grad)
        d_scale = _over_tokens(grad, y, ctx.columns, buffer)
        return grad, _product(grad, scale, buffer), d_scale, None, None
