"""A parameter whose values are not here: between two gathers of ZeRO stage 3, or where its FP8 codes are gathered."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten

from megatron_ds.errors import ShardedParameterError
from megatron_ds.shard import spec_of


class Adopter(Protocol):
    """Who gathers parameters; see :class:`~megatron_ds.zero.gatherer.Gatherer`."""

    def adopt(self, parameter: nn.Parameter) -> bool:
        """Gather a released parameter for the innermost running module; False if none is running."""


# What may be asked of a parameter whose values are not here.
_ATTRIBUTES = (
    "shape dtype device requires_grad grad grad_fn ndim layout itemsize nbytes name names _backward_hooks _base "
    "_version"
)
_METHODS = (
    "size dim numel nelement element_size stride ndimension is_contiguous is_floating_point is_complex requires_grad_ "
    "register_hook register_post_accumulate_grad_hook storage_offset is_conj is_inference is_neg _is_view __hash__ "
    "__len__ __format__ get_device"
)


def _harmless() -> frozenset[Any]:
    attributes = [getattr(Tensor, name, None) for name in _ATTRIBUTES.split()]
    attributes += [a for name in dir(Tensor) if name.startswith("is_") and not callable(a := getattr(Tensor, name))]
    allowed = [a.__get__ for a in attributes if a is not None]
    allowed += [getattr(Tensor, name) for name in _METHODS.split()]
    allowed += [getattr(Tensor.grad, "__set__"), getattr(Tensor.grad, "__delete__")]  # noqa: B009
    allowed += [getattr(Tensor.requires_grad, "__set__")]  # noqa: B009
    allowed += [torch.is_floating_point, torch.is_complex, torch.numel]
    return frozenset(allowed)


_HARMLESS = _harmless()


class ShardedPlaceholder(nn.Parameter):
    """A parameter between two gathers: it knows its shape, and refuses to be computed with."""

    zero_gatherer: Adopter

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:  # of a place in the graph; no values are needed
            return func(args[0], list(map(_edge, args[1])), **kwargs)
        if func not in _HARMLESS:
            for leaf in tree_flatten((args, kwargs))[0]:
                if isinstance(leaf, ShardedPlaceholder) and not leaf.__dict__["zero_gatherer"].adopt(leaf):
                    raise ShardedParameterError(_explain(leaf, func))
                if isinstance(leaf, CodesAlone):
                    return CodesAlone.__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    # A compiler that traced it would gather on its way, and find another class when it begins again.
    __torch_function__.__func__._torchdynamo_disable = True  # type: ignore[attr-defined]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ShardedPlaceholder({spec_of(self).name}, shape={list(self.shape)}, its values are sharded)"


def _edge(tensor: Tensor) -> Any:
    if not isinstance(tensor, ShardedPlaceholder):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return get_gradient_edge(tensor)


@cache
def _nan(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), math.nan, dtype=dtype, device=device)


class CodesAlone(nn.Parameter):
    """Placeholder of a parameter of which ZeRO stage 3 has gathered the FP8 codes alone.

    Its layer hands it to autograd. Its own memory is freed, and reading that would end the process: so an operation on
    it raises. A view or a detached alias, which layers and torch's checkpoint make, holds NaN.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_compiling() or func in _HARMLESS:
                pass
            elif func in (Tensor.view, Tensor.detach):  # layers and torch's checkpoint do not look at the values
                args = (_nan(args[0].dtype, args[0].device).expand(args[0].shape), *args[1:])
            elif func not in (Tensor.data_ptr, Tensor.untyped_storage):  # of no bytes
                leaf = next(leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, CodesAlone))
                raise ShardedParameterError(
                    f"{getattr(func, '__name__', func)}() needs the values of {spec_of(leaf).name}, of which ZeRO "
                    "stage 3 gathers FP8 codes alone for its module's forward and backward; look at it between two "
                    "steps, inside of `with optimizer.gathered([parameter]):`, or use precision.fp8_from_masters=false"
                )
            return func(*args, **(kwargs or {}))


@contextmanager
def explained() -> Iterator[None]:
    """Around a backward pass or a gather, where torch's words for what cannot be would tell a user nothing."""
    try:
        yield
    except RuntimeError as error:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise ShardedParameterError(
                "a module of ZeRO stage 3 was called inside a transform of torch.func (grad, vmap, jvp), which lets "
                "nobody gather its parameters; transform what is inside of one module's forward, or use stage 2"
            ) from error
        if not any(words in str(error) for words in ("storage of size 0", "data is not allocated yet")):
            raise
        raise ShardedParameterError(
            "the backward pass needed a parameter that ZeRO stage 3 had freed: nothing had told it that the pass had "
            "come to that parameter's block. So it is with a block that returns tensors hidden in an object, beside "
            "others; set zero.keep_whole=true, with which gathered parameters stay until the step is over, or use "
            "stage 2"
        ) from error


def _explain(parameter: nn.Parameter, func: Any) -> str:
    spec = parameter.__dict__["shard"]
    # Reading an attribute, such as .data, calls the __get__ of its descriptor.
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    what = f".{attribute}" if attribute and func.__name__ in ("__get__", "__set__") else f"{func.__name__}()"
    with torch._C.DisableTorchFunctionSubclass():
        shape = list(parameter.shape)
    return (
        f"{what} needs the values of {spec.name} {shape}, which ZeRO stage 3 has sharded: they are whole only inside "
        "the forward and backward of their module; use `with engine.gathered(parameter):`, `with engine.gathered():` "
        "for all of them, write=True to change them, or engine.state_dict(); and where a library reads them and cannot "
        "be called inside of it (a callback that follows the model), stage 2"
    )
