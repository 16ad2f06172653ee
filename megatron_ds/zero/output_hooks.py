"""The tensors that a module returns, and hooks of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten


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
