"""What stands in a parameter's ``.grad`` while its gradient lies elsewhere, in parts.

Gradients are moved into flat buffers as they come, and ``.grad`` would be None: a loop that clips or reads it itself
would do nothing, and say nothing. So between a backward pass and the next call of the engine there is an object of
the gradient's shape and without memory, which raises when it is computed with. Autograd never sees it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from megatron_ds.errors import EngineError, ShardedGradientError
from megatron_ds.shard import spec_of
from megatron_ds.zero.main_grad import is_trained

# What may be asked of a gradient that is not here.
_ATTRIBUTES = "shape dtype device layout ndim requires_grad grad_fn is_leaf is_sparse is_cpu is_cuda is_meta"
_METHODS = "size dim numel __hash__"
_HARMLESS = frozenset(
    [getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()]
    + [getattr(Tensor, name) for name in _METHODS.split()]
)


class ShardedGradient(Tensor):
    """Stands for the gradient of ``parameter``: its shape, dtype and device alone."""

    parameter_name: str

    @staticmethod
    def __new__(cls, parameter: nn.Parameter) -> ShardedGradient:
        made = torch.Tensor._make_wrapper_subclass(cls, parameter.shape, dtype=parameter.dtype, device=parameter.device)
        made.parameter_name = spec_of(parameter).name
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise _refusal(args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise _refusal(args, kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ShardedGradient({self.parameter_name}, shape={list(self.shape)})"


def _refusal(args: Any, kwargs: Any) -> ShardedGradientError:
    name = next(leaf.parameter_name for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, ShardedGradient))
    return ShardedGradientError(
        f"{name}.grad: the engine keeps gradients in parts over the ranks, and they are not here; to update call "
        "engine.step(), which scales the loss of fp16 by itself, and not the optimizer's or a GradScaler's; to look at "
        f"one use engine.get_gradient({name!r}) between the last backward() of a step and step(); to clip, "
        "optimizer.clip_norm in the configuration, or an Accelerator's clip_grad_norm_ or clip_grad_value_"
    )


class Placeholders:
    """Puts them there and takes them away; made once, because a large model has thousands of parameters."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self._parameters = [parameter for parameter in parameters if is_trained(parameter)]
        self._gradients: list[ShardedGradient] = []
        self._there = False

    def put(self) -> None:
        if not self._gradients:
            self._gradients = [ShardedGradient(parameter) for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, self._gradients):
            parameter.grad = gradient
        self._there = True

    def zeroed(self) -> bool:
        """Whether somebody has set them all to None, as ``optimizer.zero_grad()`` and ``module.zero_grad()`` do.

        Raises:
            EngineError: some of them, or set to something else; that would be lost.
        """
        if not self._there:
            return False
        changed = [(p.grad, own) for p, own in zip(self._parameters, self._gradients) if p.grad is not own]
        if not changed:
            return False
        for gradient, own in changed:
            if gradient is not None or len(changed) < len(self._gradients):
                raise EngineError(
                    f"{own.parameter_name}.grad was {'set to None alone' if gradient is None else 'set to a tensor'}, "
                    "but the gradients are in the engine's buffers, which keep all of them; to drop all, use "
                    "engine.zero_grad(), and for a parameter that is not to be trained requires_grad_(False)"
                )
        return True

    def remove(self) -> None:
        """Before anything computes: autograd would add to them, and a compiler would look at them."""
        if self._there:
            for parameter in self._parameters:
                parameter.grad = None
            self._there = False
