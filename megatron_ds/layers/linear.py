"""Linear layers, split over the tensor-parallel axis.

Shapes: ``s`` sequence, ``b`` batch, ``h`` hidden. Activations are ``[s, b, h]``, so that splitting or gathering the
sequence is contiguous. Under sequence parallelism activations outside a tensor-parallel pair of layers are
``[s / tp, b, h]`` (Korthikanti et al. 2022, section 4.2.2).

A pair is a :class:`ColumnParallelLinear` (splits its outputs, needs the whole sequence) followed by a
:class:`RowParallelLinear` (splits its inputs, returns a sum over ranks). In the backward pass of the column layer the
collective on the input gradient runs while the weight gradient is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.kernels.accumulate import sum_rows
from megatron_ds.kernels.autograd import first_derivative_only, main_gradients
from megatron_ds.kernels.column_sums import add_to_gradient
from megatron_ds.layers.recipe import OwnPrecision, Recipe, Split
from megatron_ds.mesh import Axis
from megatron_ds.shard import WHOLE, ShardedDim, ShardSpec, empty_parameter

Recompute = Callable[[], Tensor]


class BiasOffer:
    """Fused bias gradient: lets the operator behind a linear layer make the gradient of the layer's bias.

    The operator takes the bias (``x_bias`` in :mod:`megatron_ds.kernels.norm`) and adds up its gradient while it writes
    that of the layer's output. Only an operator that is the sole user of the output may take it. Where none does, the
    layer reads the gradient of its output once more.
    """

    __slots__ = ("_bias", "taken")  # and no attributes that look like a module's outputs

    def __init__(self) -> None:
        self._bias: Tensor | None = None
        self.taken = False

    def made(self, bias: Tensor | None) -> BiasOffer:
        self._bias = bias
        return self

    def take(self) -> Tensor | None:
        """The bias, if one is there and trained: its gradient is not made elsewhere."""
        if self._bias is None or not self._bias.requires_grad or not torch.is_grad_enabled():
            return None
        self.taken = True
        return self._bias


def column_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, layer: Split, offer: BiasOffer | None = None
) -> Tensor:
    if torch.is_grad_enabled():
        return _ColumnLinear.apply(x, weight, bias, layer, (offer or BiasOffer()).made(bias))
    return _column_product(x, weight, bias, layer)  # autograd's own time is felt where there are few tokens


def _column_product(x: Tensor, weight: Tensor, bias: Tensor | None, layer: Split) -> Tensor:
    whole = comm.gather_dim0(x, layer.tp).wait() if layer.sequence_parallel else x
    return layer.recipe.product(whole, _matrix(weight), None if bias is None else bias.view(-1))


class _ColumnLinear(torch.autograd.Function):
    """``y = gather(x) @ w.T + b`` with the collective of each direction overlapped where something can hide it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Split, offer: BiasOffer) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.main_grads = main_gradients(weight, bias)
        ctx.tp, ctx.sequence_parallel, ctx.recipe, ctx.offer = layer.tp, layer.sequence_parallel, layer.recipe, offer
        return _column_product(x, weight, bias, layer)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        weight_main, bias_main = ctx.main_grads
        tp: Axis = ctx.tp
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        (grad,) = grads
        # Only the rank's own part of the sequence was kept; the rest is gathered again behind the first matmul.
        gathered = comm.gather_dim0(x, tp) if ctx.sequence_parallel and need_weight else comm.Pending(x)
        reduced = None
        if need_x:
            grad_x = ctx.recipe.input_gradient(grad, _matrix(weight))
            reduced = comm.scatter_sum_dim0(grad_x, tp) if ctx.sequence_parallel else comm.all_reduce_start(grad_x, tp)
        grad_weight = _weight_gradient(ctx.recipe, weight, weight_main, grad, gathered.wait()) if need_weight else None
        grad_bias = _bias_gradient(bias, bias_main, grad) if need_bias and not ctx.offer.taken else None
        return reduced.wait() if reduced is not None else None, grad_weight, grad_bias, None, None


def _matrix(weight: Tensor) -> Tensor:
    return weight.view(-1, weight.shape[-1])


def _weight_gradient(recipe: Recipe, weight: Tensor, main_grad: Any, grad: Tensor, x: Tensor) -> Tensor | None:
    """The weight's gradient from ``grad [s, b, out]`` and ``x [s, b, in]``: straight into the gradient buffer where an
    optimizer gave the weight one (see ``zero/main_grad.py``), which spares a pass over memory."""
    if main_grad is not None:
        main_grad.add_matmul(grad, x, recipe.add_weight_gradient)
        return None
    return recipe.weight_gradient(grad, x).view(weight.shape)


def _bias_gradient(bias: Tensor, main_grad: Any, grad: Tensor) -> Tensor | None:
    """The bias's gradient, likewise."""
    return add_to_gradient(bias, sum_rows(grad), main_grad)


class _Linear(nn.Module):
    """What the two linear layers have in common."""

    def __init__(self, tp: Axis, sequence_parallel: bool):
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel and tp.size > 1
        self.recipe: Recipe = OwnPrecision()


class ColumnParallelLinear(_Linear):
    """``[s(/tp), b, in] -> [s, b, prod(out_shape) / tp]``.

    Args:
        name: global name of the layer; its parameters are ``name.weight`` and ``name.bias``.
        in_features: width of the input, whole on every rank.
        out_shape: the output features as a shape; the weight is ``[*out_shape, in_features]``.
        shard_dim: the dim of ``out_shape`` that is split, e.g. heads of ``[groups, heads, head_dim]``.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_shape: tuple[int, ...],
        *,
        shard_dim: int,
        bias: bool,
        tp: Axis,
        sequence_parallel: bool,
        init_std: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(tp, sequence_parallel)
        placements = (ShardedDim.over(tp, shard_dim),)
        spec = ShardSpec(f"{name}.weight", (*out_shape, in_features), placements, std=init_std, matrices=WHOLE)
        self.weight = empty_parameter(spec, device, dtype)
        of_bias = ShardSpec(f"{name}.bias", out_shape, placements, init="zeros", weight_decay=False)
        self.bias = empty_parameter(of_bias, device, dtype) if bias else None
        self.out_shape = self.weight.shape[:-1]

    def forward(self, x: Tensor, offer: BiasOffer | None = None) -> Tensor:
        if torch.compiler.is_compiling() and self.tp.size == 1:
            return self.recipe.traced(x, _matrix(self.weight), None if self.bias is None else self.bias.view(-1))
        return column_linear(x, self.weight, self.bias, self, offer)


class RepeatedKVLinear(_Linear):
    """Query/key/value projection of fewer key/value heads than ranks: ``[s(/tp), b, h] -> [s, b, (q + 2) * d]``.

    A rank computes ``q = heads / tp`` queries of one key/value head, and that head's key and value, as the other ranks
    of it do. Its queries, key and value are no slice of the weight, so every rank holds all of it, and the gradient is
    summed over tp.

    Args:
        out_shape: key/value heads, queries of each and 2, head dim; the weight is ``[*out_shape, in_features]``.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_shape: tuple[int, int, int],
        *,
        bias: bool,
        tp: Axis,
        sequence_parallel: bool,
        init_std: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(tp, sequence_parallel)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = replicated_parameter(
            f"{name}.weight", (*out_shape, in_features), "normal", tp, True, weight_decay=True, std=init_std, **place
        )
        self.bias = replicated_parameter(f"{name}.bias", out_shape, "zeros", tp, True, **place) if bias else None
        ranks = tp.size // out_shape[0]  # of a key/value head
        self.queries = (out_shape[1] - 2) // ranks
        self.kv_head, self.first_query = tp.rank // ranks, tp.rank % ranks * self.queries

    def forward(self, x: Tensor, offer: BiasOffer | None = None) -> Tensor:
        weight = self.weight[self.kv_head] if self.recipe.has_weight else self.own(self.weight)
        return column_linear(x, weight, None if self.bias is None else self.own(self.bias), self, offer)

    def own(self, parameter: Tensor) -> Tensor:
        """``[q + 2, d, ...]`` of a parameter."""
        head = parameter[self.kv_head]
        return torch.cat((head[self.first_query : self.first_query + self.queries], head[-2:]))


def _row_product(x: Tensor, weight: Tensor, bias: Tensor | None, layer: _Linear) -> Tensor:
    tp = layer.tp
    # The first rank's product brings the bias, so that the sum has it once, without a pass of its own.
    partial = layer.recipe.product(x, weight, bias if tp.is_first else None)
    if tp.size == 1:
        return partial
    return comm.scatter_sum_dim0(partial, tp).wait() if layer.sequence_parallel else comm.all_reduce(partial, tp)


class _RowLinear(torch.autograd.Function):
    """``y = sum over ranks of x @ w.T, + b``, whole on every rank or scattered along the sequence."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: _Linear, offer: BiasOffer, *how: Any
    ) -> Tensor:
        ctx.recompute, unused = how
        ctx.save_for_backward(x if ctx.recompute is None else None, weight, bias)
        ctx.main_grads = main_gradients(weight, bias)
        ctx.tp, ctx.sequence_parallel, ctx.recipe, ctx.offer = layer.tp, layer.sequence_parallel, layer.recipe, offer
        if unused:
            return x.new_empty(1).expand(*x.shape[:-1], weight.shape[0])
        return _row_product(x, weight, bias, layer)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        weight_main, bias_main = ctx.main_grads
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        gathered = comm.gather_dim0(grads[0], ctx.tp) if ctx.sequence_parallel else comm.Pending(grads[0])
        grad_bias = _bias_gradient(bias, bias_main, grads[0]) if need_bias and not ctx.offer.taken else None
        grad = gathered.wait()
        grad_x = ctx.recipe.input_gradient(grad, weight) if need_x else None
        if ctx.recompute is not None:
            x = ctx.recompute() if need_weight else None
            ctx.recompute = None  # and with it what it holds
        grad_weight = _weight_gradient(ctx.recipe, weight, weight_main, grad, x) if need_weight else None
        return grad_x, grad_weight, grad_bias, None, None, None, None


class RowParallelLinear(_Linear):
    """``[s, b, in / tp] -> [s(/tp), b, out]``: the ranks' partial products are summed, then the bias is added once."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        tp: Axis,
        sequence_parallel: bool,
        init_std: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(tp, sequence_parallel)
        placements = (ShardedDim.over(tp, 1),)
        spec = ShardSpec(f"{name}.weight", (out_features, in_features), placements, std=init_std, matrices=WHOLE)
        self.weight = empty_parameter(spec, device, dtype)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        partial = self.sequence_parallel
        self.bias = (
            replicated_parameter(f"{name}.bias", (out_features,), "zeros", tp, partial, **place) if bias else None
        )

    def forward(
        self, x: Tensor, offer: BiasOffer | None = None, recompute: Recompute | None = None, unused: bool = False
    ) -> Tensor:
        """
        Args:
            recompute: makes ``x`` again in the backward pass, for which it is not kept.
            unused: nobody looks at the output, which is not computed: only what the backward pass needs is kept.
        """
        if torch.compiler.is_compiling() and self.tp.size == 1:
            return self.recipe.traced(x, self.weight, self.bias)
        if not torch.is_grad_enabled():
            return _row_product(x, self.weight, self.bias, self)
        offer = (offer or BiasOffer()).made(self.bias)
        return _RowLinear.apply(x, self.weight, self.bias, self, offer, recompute, unused)


def replicated_parameter(
    name: str,
    shape: tuple[int, ...],
    init: Any,
    tp: Axis,
    partial: bool,
    *,
    weight_decay: bool = False,
    std: float = 0.02,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Parameter:
    """A parameter that every tensor-parallel rank holds whole; rank 0's copy is the one that counts.

    ``partial``: each rank's gradient covers only its part of the sequence (or its heads) and must be summed over tp.
    """
    over = ("tp",) if partial and tp.size > 1 else ()
    spec = ShardSpec(name, shape, reduce_over=over, replica=tp.rank > 0, init=init, std=std, weight_decay=weight_decay)
    return empty_parameter(spec, device, dtype)


def output_std(init_std: float, num_layers: int) -> float:
    """Initial std of the layers that write to the residual stream: ``std / sqrt(2 L)`` (GPT-2 paper, section 2.3)."""
    return init_std / math.sqrt(2.0 * num_layers)
