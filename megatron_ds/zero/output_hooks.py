"""The tensors that a module gets and returns, and hooks of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from megatron_ds.zero.units import Use


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in what a module returns, also those that are attributes of an object (a dataclass, say)."""
    for leaf in tree_flatten(output)[0]:
        found = [leaf] if isinstance(leaf, Tensor) else getattr(leaf, "__dict__", {}).values()
        yield from (value for value in found if isinstance(value, Tensor))


def register_first(tensor: Tensor, hook: Callable[..., None]) -> None:
    """A hook of the tensor's gradient, which is called before those that are there: a module's own may compute."""
    handle = tensor.register_hook(hook)
    hooks: Any = tensor._backward_hooks  # called in the order of insertion, whatever move_to_end() says
    for other in [key for key in hooks if key != handle.id]:
        hooks[other] = hooks.pop(other)


class AfterBackward(torch.autograd.Function):
    """Identity on a unit's inputs, whose backward runs when the unit's own is over: it calls ``end(use)``."""

    @staticmethod
    def forward(ctx: Any, end: Callable[[Use], None], use: Use, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.end, ctx.use = end, use
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        ctx.use.unit.unseen = True  # the backward pass of the tangents calls no hook
        return tuple(tangent if tangent is None else tangent.view_as(tangent) for tangent in tangents[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.end(ctx.use)
        return None, None, *grads
