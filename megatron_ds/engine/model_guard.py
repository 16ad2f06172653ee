"""Whether the model is still the one that the engine took over: changed behind its back it trains wrongly, silently.

After ``model.half()`` or ``parameter.data = ...`` updates go to memory that the model no longer uses. So each step
looks, before it updates: some tenths of a microsecond a parameter and a module. What was trained may be frozen for a
while. A parameter unfrozen or added later is no error unless the optimizer has it: somebody else may train it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from megatron_ds.errors import ConfigError
from megatron_ds.shard import spec_of
from megatron_ds.zero.main_grad import is_trained
from megatron_ds.zero.optimizer import ZeroOptimizer

_RESIZING = "; change its shape inside `with engine.resizing():`, or call engine.close() and initialize() again"
_AGAIN = "; change that before initialize(), or call engine.close() and initialize() again"


def require_trainable_dtype(name: str, parameter: nn.Parameter) -> None:
    """Raise ConfigError if gradients of the parameter would be rounded away."""
    if parameter.is_floating_point() and parameter.itemsize == 1:
        raise ConfigError(
            f"{name} is of dtype {str(parameter.dtype).removeprefix('torch.')}, to which autograd rounds its gradient: "
            "most of it becomes 0. Keep it in bfloat16 and let forward() cast it, or freeze it with "
            "requires_grad_(False)"
        )


@dataclass
class _Seen:
    """A parameter as it was. ``pointer``: where its values lie; None where that may change."""

    name: str
    parameter: nn.Parameter
    trained: bool
    shape: torch.Size
    pointer: int | None = None


class ModelGuard:
    """Looks at a model and an optimizer and compares them with what they were.

    Attributes:
        strays: parameters that require a gradient now and are not trained by the engine; by name.
    """

    def __init__(self, module: nn.Module, zero: ZeroOptimizer, optimizer: Optimizer | None):
        self._module, self._optimizer = module, optimizer
        self._groups = self._groups_now()
        self.strays: dict[str, nn.Parameter] = {}
        self._added: dict[str, nn.Parameter] = {}
        sharded = zero.gatherer
        self._seen = [_Seen(spec_of(p).name, p, is_trained(p), p.shape) for p in module.parameters()]
        self._whole = [s for s in self._seen if s.trained and (sharded is None or not sharded.bucket_of(s.parameter))]
        self._children: list[tuple[nn.Module, list[nn.Module | None]]] = []
        self._own: list[tuple[nn.Module, list[nn.Parameter | None]]] = []
        self._note_structure()
        for seen in self._whole:
            seen.pointer = seen.parameter.data_ptr()

    def fault(self) -> str | None:
        """What has changed and what to do, or None."""
        return self._fault_of_structure() or self._fault_of_parameters() or self._fault_of_optimizer()

    def late(self) -> dict[str, nn.Parameter]:
        """What was unfrozen since and is to be trained: the optimizer has it, or trains all (the configuration's)."""
        unfrozen = {s.name: s.parameter for s in self._seen if s.parameter.requires_grad and not s.trained}
        if not unfrozen or self._optimizer is None:
            return unfrozen
        optimized = self._groups_now()
        return {name: parameter for name, parameter in unfrozen.items() if id(parameter) in optimized}

    def _fault_of_parameters(self) -> str | None:
        self.strays = {s.name: s.parameter for s in self._seen if s.parameter.requires_grad and not s.trained}
        for name, parameter in self.late().items() if self.strays else ():
            del self.strays[name]
            if parameter.grad is not None:
                return (
                    f"{name} was unfrozen in the middle of a step, of which it got a part of the gradient; call "
                    "requires_grad_() between step() and the next forward pass"
                )
        self.strays.update(self._added)
        for seen in self._seen:
            if seen.parameter.shape != seen.shape:
                return (
                    f"{seen.name} has shape {list(seen.parameter.shape)} now and had {list(seen.shape)} at "
                    f"initialize(), as after resize_token_embeddings(): its gradient and state lack the rest{_RESIZING}"
                )
        for seen in self._whole:
            if seen.parameter.data_ptr() != seen.pointer:
                return (
                    f"{seen.name} has left the engine's memory, as after model.half(), model.to(...) or parameter.data "
                    f"= ...: updates would not reach the model{_AGAIN}; precision.dtype gives the dtype, "
                    "engine.set_parameter() values"
                )
        return None

    def _fault_of_structure(self) -> str | None:
        """Other modules or parameters. Modules may come and go, as long as they have the parameters of before."""
        same = all(list(module._modules.values()) == children for module, children in self._children) and all(
            len(own) == len(module._parameters) and all(a is b for a, b in zip(own, module._parameters.values()))
            for module, own in self._own
        )
        if same:
            return None
        known = {id(seen.parameter) for seen in self._seen}
        now = dict(self._module.named_parameters())
        there = {id(parameter) for parameter in now.values()}
        for seen in self._seen:
            if seen.trained and id(seen.parameter) not in there:
                return f"{seen.name} is no longer a parameter of the model, but would still be updated{_RESIZING}"
        self._added = {name: p for name, p in now.items() if p.requires_grad and id(p) not in known}
        self._note_structure()
        return None

    def _fault_of_optimizer(self) -> str | None:
        known = {id(seen.parameter) for seen in self._seen}
        now = self._groups_now()
        if self._groups.items() <= now.items() and now.keys() - self._groups.keys() <= known:
            return None
        moved = [s.name for s in self._seen if now.get(id(s.parameter)) != self._groups.get(id(s.parameter))]
        if moved and now.keys() == self._groups.keys():
            return (
                f"{moved[0]} is in another group of the optimizer than at initialize(), which notes them once{_AGAIN}"
            )
        return f"the optimizer's groups have other parameters than at initialize(), which takes them over once{_AGAIN}"

    def _note_structure(self) -> None:
        modules = list(self._module.modules())
        self._children = [(m, list(m._modules.values())) for m in modules if m._modules]
        self._own = [(m, list(m._parameters.values())) for m in modules if m._parameters]

    def _groups_now(self) -> dict[int, int]:
        """The id of each parameter of the optimizer, and the index of its group."""
        groups = self._optimizer.param_groups if self._optimizer is not None else ()
        return {id(parameter): index for index, group in enumerate(groups) for parameter in group["params"]}
