"""Models that come in a wrapper: torch.compile's is looked through, one that shards or averages itself is refused."""

from __future__ import annotations

from typing import cast

from torch import nn

from megatron_ds.errors import ConfigError

_COMPILED = "_orig_mod."  # what torch.compile puts before the names of what it wraps
# By name: importing them all takes a second.
_PARALLEL = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model whose names and configuration count: of ``torch.compile(model)`` the model itself.

    Raises:
        ConfigError: the model averages or shards its parameters over ranks already, so that both would.
    """
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _PARALLEL:
                raise ConfigError(
                    f"{name or 'the model'} is wrapped in {cls.__name__} ({cls.__module__}), which exchanges gradients "
                    "or shards parameters as the engine does; give initialize() the model as it was before"
                )
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise ConfigError(
                f"{name} is a DTensor, split over ranks already; give initialize() the model as it was before, or a "
                "mesh with tp and the layers of megatron_ds.layers"
            )
    while type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
        model = cast(nn.Module, model._orig_mod)
    return model


def plain_name(name: str) -> str:
    """A parameter's or buffer's name as it is where no part of the model is compiled: what is saved has this one."""
    return name.replace(_COMPILED, "")
