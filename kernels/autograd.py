"""Autograd functions whose backward pass is written by hand, and gradients of gradients.

Such a backward pass is not itself recorded. Where a caller asks for gradients of gradients (``create_graph=True``),
what it computes would look like a constant, and a second derivative would lack terms without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def main_gradients(*parameters: Tensor | None) -> tuple[Any, ...]:
    """The main gradients (:mod:`megatron_ds.zero.main_grad`) of parameters, or None, for an autograd function to keep.

    To be called in its ``forward``: where activations are recomputed, ``ctx.saved_tensors`` are copies that lack it,
    and the gradient would come to the parameter by way of its own dtype.
    """
    return tuple(getattr(parameter, "main_grad", None) for parameter in parameters)


def first_derivative_only(backward: Backward) -> Backward:
    """Mark the ``backward`` of a ``torch.autograd.Function``: under ``create_graph=True`` it raises RuntimeError.

    ``torch.autograd.function.once_differentiable`` is not enough: it raises only where an incoming gradient requires
    gradients (not behind the last layer), and never in ``torch.autograd.grad``, which walks the paths to its inputs.
    """
    name = backward.__qualname__.removesuffix(".backward").lstrip("_")

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"create_graph=True, but {name} has no second derivative; use create_graph=False, or for a gradient "
                "penalty write the model with torch's own modules, whose backward passes are recorded"
            )
        return backward(ctx, *grads)

    return wrapper
