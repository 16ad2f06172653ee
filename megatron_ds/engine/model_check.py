"""What no engine can train as plain torch does, told before anything is changed."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from megatron_ds.errors import ConfigError


def check_model(model: nn.Module, gathers: bool = False, ranks: int = 1) -> None:
    """Raise ConfigError, with the way out. ``gathers``: parameters are whole only while their module is used.

    ``ranks``: that have the same parameters.
    """
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ConfigError(
            f"{lazy[0]} has no shape yet; call the model once with a batch, as lazy modules want, before initialize()"
        )
    for name, parameter in model.named_parameters():
        if is_traceable_wrapper_subclass(parameter) and (parameter.requires_grad or ranks > 1):
            raise ConfigError(
                f"{name} is a {type(parameter).__name__}, a tensor made of others as torchao's are, and an engine "
                "keeps and sends plain ones alone: quantize after training; for adapters of a model in 8 or 4 bits "
                "use bitsandbytes, for products in FP8 torchao's convert_to_float8_training"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise ConfigError(
                f"{name or 'the model'} gives a sparse gradient, and flat buckets are dense; make it with sparse=False"
            )
    for name, module in model.named_modules() if gathers else ():
        if isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None:
            raise ConfigError(
                f"{name or 'the model'} is TorchScript, which runs no hook that would gather its parameters at ZeRO "
                "stage 3; use zero.stage=2, or the module before torch.jit.script() or trace()"
            )
    _require_own_memory(model)


def _require_own_memory(model: nn.Module) -> None:
    """Parameters move to flat buffers one by one, so that two tensors that are one memory now would come apart."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    places = [(*_range(tensor), name) for name, tensor in tensors.items() if _has_range(tensor)]
    for (_, end, first), (start, _, second) in pairwise(sorted(places)):
        if start < end and (tensors[first].requires_grad or tensors[second].requires_grad):
            raise ConfigError(
                f"{first} and {second} are two tensors in one memory, as after a.weight.data = b.weight.data, and "
                "would come apart; tie parameters by a.weight = b.weight, or clone() what only lies beside another; a "
                "buffer that shows one may be a property"
            )


def _has_range(tensor: Tensor) -> bool:
    plain = type(tensor.data) is Tensor and tensor.layout == torch.strided
    return plain and not tensor.is_meta and tensor.numel() > 0


def _range(tensor: Tensor) -> tuple[int, int]:
    """The first byte and the one after the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
