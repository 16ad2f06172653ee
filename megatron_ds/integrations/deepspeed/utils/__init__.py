"""``deepspeed.utils``: modules that are gathered as one, whole values of sharded parameters, the log."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from megatron_ds.engine import Engine
from megatron_ds.errors import ConfigError
from megatron_ds.integrations.deepspeed.links import engine_of
from megatron_ds.shard import spec_of

logger = logging.getLogger("deepspeed")

_LEAF = "_z3_leaf"


class RepeatingLoader:
    """The batches of ``loader`` without end: it is begun again where it ends."""

    def __init__(self, loader: Iterable[Any]):
        self.loader = loader
        self._batches = iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._batches)
        except StopIteration:
            self._batches = iter(self.loader)
            return next(self._batches)


def set_z3_leaf_modules(model: nn.Module, leaf_module_classes: Sequence[type[nn.Module] | str]) -> list[nn.Module]:
    """Stage 3 gathers each module of these classes (or class names) as one; to be called before ``initialize()``.

    Raises:
        ConfigError: the model has none.
    """
    found = [
        module
        for module in model.modules()
        if any(
            type(module).__name__ == wanted if isinstance(wanted, str) else isinstance(module, wanted)
            for wanted in leaf_module_classes
        )
    ]
    if not found:
        raise ConfigError(
            f"no module of the model is one of {list(leaf_module_classes)}; it has "
            f"{', '.join(sorted({type(module).__name__ for module in model.modules()})[:12])}"
        )
    for module in found:
        setattr(module, _LEAF, True)
    return found


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if getattr(module, _LEAF, False)]


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """The whole master weight, on all ranks; None of a parameter that no engine trains."""
    engine = engine_of(param)
    return None if engine is None else engine.get_parameter(spec_of(param).name)


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    engine = engine_of(param)
    return None if engine is None else engine.get_optimizer_state(spec_of(param).name, optim_state_key)


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """The whole gradient, averaged over the ranks; after the last backward pass of a step, as no other may follow."""
    engine = engine_of(param)
    return None if engine is None else engine.get_gradient(spec_of(param).name, partial=True)


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Sets the master weight, on all ranks, which give the same value; the next forward pass has it."""
    _engine_of(param).set_parameter(spec_of(param).name, value)


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Sets a part of the optimizer state, such as ``"exp_avg"``, on all ranks, which give the same value."""
    _engine_of(param).set_optimizer_state(spec_of(param).name, optim_state_key, value)


def _engine_of(param: nn.Parameter) -> Engine:
    engine = engine_of(param)
    if engine is None:
        raise ConfigError(f"no engine trains the parameter of shape {list(param.shape)}; call initialize() first")
    return engine


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Logs on these ranks; on all of them for None or -1 among them."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if not ranks or -1 in ranks or rank in ranks:
        logger.log(level, "[rank %d] %s", rank, message)
