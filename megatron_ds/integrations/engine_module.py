"""The engine as the libraries around it take it: a module whose forward is the engine's, an optimizer whose step is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.optim import Optimizer

from megatron_ds.engine import Engine
from megatron_ds.errors import ConfigError, EngineError
from megatron_ds.train.step import StepResult


class EngineModel(nn.Module, Joinable):
    """The model as other libraries take it: a module whose forward is the engine's, and which torch's Join takes."""

    def __init__(self, engine: Engine):
        super().__init__()
        self.module = engine.module
        self._engine = [engine]  # in a list, because the engine is not a part of the module

    @property
    def engine(self) -> Engine:
        return self._engine[0]

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.engine(*arguments, **keywords)

    def no_sync(self) -> AbstractContextManager[None]:
        """Around all passes of a step but the last, as of DistributedDataParallel."""
        return self.engine.no_sync()

    @property
    def _join_config(self) -> Any:
        return self.engine._join_config

    @_join_config.setter
    def _join_config(self, config: Any) -> None:
        self.engine._join_config = config

    def join_hook(self, **kwargs: Any) -> JoinHook:
        return self.engine.join_hook(**kwargs)

    @property
    def join_device(self) -> torch.device:
        return self.engine.join_device

    @property
    def join_process_group(self) -> Any:
        return self.engine.join_process_group

    def _get_name(self) -> str:
        return self.module._get_name()  # libraries look the kind of a model up by it


def require_one_schedule(engine: Engine, *optimizers: Any) -> None:
    """Raise ConfigError where a torch scheduler was made of an optimizer whose rates the configuration sets."""
    schedule = engine.config.schedule
    if schedule is not None and any(hasattr(o.step, "_wrapped_by_lr_sched") for o in (*optimizers, engine.optimizer)):
        raise ConfigError(
            f"the configuration's scheduler, {schedule.name}, sets the learning rate of each update, and the script "
            "has made a torch scheduler of the same optimizer, whose rates would be lost; remove one of them"
        )


class EngineOptimizer(Optimizer):
    """The optimizer as other libraries take it: settings are the user's optimizer's own, a step is the engine's."""

    def __init__(self, engine: Engine, stepped: Callable[[StepResult], None]):
        assert engine.optimizer is not None
        self.engine, self.stepped = engine, stepped
        self.defaults, self.state = engine.optimizer.defaults, engine.optimizer.state
        self.param_groups = engine.optimizer.param_groups
        for mode in ("train", "eval"):  # of Schedule-Free; other libraries call them where they are there
            if hasattr(engine.optimizer, mode):
                setattr(self, mode, getattr(engine.optimizer, mode))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ConfigError("a closure cannot be evaluated again on sharded gradients; call step() without one")
        require_one_schedule(self.engine, self)
        result = self.engine.step()
        if result is None:
            raise EngineError(
                "optimizer.step() after backward passes that were all in no_sync(), whose gradients no rank has got "
                "from the others; leave the last pass of a step outside (LocalSGD leaves none outside, and cannot be "
                "used)"
            )
        self.stepped(result)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.engine.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Settings alone, and of how many updates: the state is in the engine's checkpoints."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {"state": {}, "param_groups": groups, "updates": self.engine.zero.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the settings. ConfigError where the state, which is not there, would be that of other updates."""
        updates = state_dict.get("updates", self.engine.zero.count)
        if state_dict["state"] or updates != self.engine.zero.count:
            taken = "of another optimizer" if state_dict["state"] else f"after {updates} updates"
            raise ConfigError(
                f"load_state_dict() of an engine's optimizer, after {self.engine.zero.count} updates, takes settings "
                f"alone and no state (moments), and these were taken {taken}; save and load the state with an "
                "Accelerator's save_state() and load_state() or the engine's save_checkpoint() and load_checkpoint(), "
                "or load it into the torch optimizer before the engine is made"
            )
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
