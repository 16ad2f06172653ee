"""Recipes: in which numbers the three matrix products of a linear layer run.

A linear layer asks one object for its forward product, its input gradient and its weight gradient, in eager mode and
under ``torch.compile``. :class:`OwnPrecision` is what a layer begins with; :func:`use_recipe` gives a model another.

A recipe may have state, such as the scales of an FP8 format. It lives in buffers that :meth:`Recipe.add_state` makes:
they have a global name and a shard like a parameter, and a checkpoint keeps them.

Shapes: ``x [..., in]``, ``weight [out, in]``, ``bias [out]``, ``grad [..., out]``. Activations and their gradients come
as the layer has them, ``[s, b, ...]``, so that a recipe knows the sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.kernels.accumulate import add_product
from megatron_ds.kernels.autograd import first_derivative_only
from megatron_ds.kernels.matmul import linear, linear_input_gradient
from megatron_ds.mesh import Axis
from megatron_ds.shard import ShardedDim, ShardSpec


class Recipe(nn.Module):
    """The products of one linear layer. They run inside the layer's backward pass, which autograd does not record.

    Attributes:
        has_weight: it keeps the weight in a form of its own, and what the layer gives it is not read.
    """

    has_weight = False

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``: ``[..., out]``."""
        raise NotImplementedError

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """``grad @ weight``: ``[..., in]``."""
        raise NotImplementedError

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """``grad.T @ x`` over all tokens: ``[..., out]``, ``[..., in] -> [out, in]``."""
        raise NotImplementedError

    def add_weight_gradient(self, total: Tensor, grad: Tensor, x: Tensor, first: bool) -> None:
        """Add :meth:`weight_gradient` to the main gradient ``total [out, in]``; ``first``: set it."""
        gradient = self.weight_gradient(grad, x)
        total.copy_(gradient) if first else total.add_(gradient)

    def traced(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """:meth:`product`, differentiable, for ``torch.compile`` on one tensor-parallel rank."""
        out: Tensor = _Traced.apply(x, weight, bias, self)
        return out

    def add_state(
        self, of: ShardSpec, name: str, initial: Tensor, placements: tuple[ShardedDim, ...] | None = None
    ) -> None:
        """Make the buffer ``self.<name>``, which a checkpoint keeps.

        Args:
            of: the weight's shard. The buffer's global name follows from it (``layers.3.mlp.up.recipe.<name>``).
            initial: the whole buffer. Ranks that hold a copy each must keep it alike.
            placements: its sharded dims; None: every rank holds the whole.
        """
        copy = placements is None and any(cut.index > 0 for cut in of.placements)
        spec = replace(
            of,
            name=f"{of.name.removesuffix('.weight')}.recipe.{name}",
            global_shape=tuple(initial.shape),
            placements=placements or (),
            replica=of.replica or copy,
        )
        buffer = spec.slice_of(initial).clone()
        buffer.shard = spec  # type: ignore[attr-defined]
        self.register_buffer(name, buffer)


class Split(Protocol):
    """What a linear layer's products need to know of it: the recipe, and over which ranks they are split."""

    tp: Axis
    sequence_parallel: bool
    recipe: Recipe


class OwnPrecision(Recipe):
    """Every product in the dtype of its operands; sums over tokens in that of the main gradient."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        return linear_input_gradient(grad, weight)

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        return _over_tokens(grad).t().mm(_over_tokens(x))

    def add_weight_gradient(self, total: Tensor, grad: Tensor, x: Tensor, first: bool) -> None:
        add_product(total, _over_tokens(grad).t(), _over_tokens(x), first)

    def traced(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


def _over_tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Traced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        return recipe.product(x, weight, bias)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,), recipe = grads, ctx.recipe
        grad_bias = _over_tokens(grad).sum(0) if ctx.needs_input_grad[2] else None
        return recipe.input_gradient(grad, weight), recipe.weight_gradient(grad, x), grad_bias, None


def use_recipe(model: nn.Module, make: Callable[[ShardSpec], Recipe]) -> None:
    """Give every linear layer of ``model`` the recipe that ``make`` makes for its weight."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "recipe", None), Recipe):
            module.recipe = make(module.weight.shard)  # type: ignore[union-attr, arg-type]
