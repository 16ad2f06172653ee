"""Accelerate on the engine: ``prepare`` in place of ``accelerator.prepare`` for the model and its optimizer.

::

    accelerator = Accelerator(gradient_accumulation_steps=4)
    model, optimizer = prepare(accelerator, model, optimizer, {"zero": {"stage": 2}})
    loader = accelerator.prepare(loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if accelerator.sync_gradients:
            scheduler.step()

Accelerate has no interface for a backend of one's own, so methods of this one ``accelerator`` object are replaced:
``backward``, ``clip_grad_norm_``, ``unwrap_model`` and ``get_state_dict``. Schedulers are ordinary torch schedulers of
the returned optimizer. Not connected: ``accelerator.save_state`` and ``load_state`` (use
``model.engine.save_checkpoint`` and ``load_checkpoint``), ``clip_grad_value_``, and ``.grad``, which is None (use
``model.engine.get_gradient``). ``mixed_precision`` of the Accelerator is not asked: set ``precision.dtype``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron_ds.config.engine import EngineConfig
from megatron_ds.engine import Engine, initialize, read_config
from megatron_ds.engine.build import Configuration
from megatron_ds.errors import ConfigError
from megatron_ds.train.step import StepResult


class EngineModel(nn.Module):
    """The model as other libraries take it: a module whose forward is the engine's."""

    def __init__(self, engine: Engine):
        super().__init__()
        self.module = engine.module
        self._engine = [engine]  # in a list, because the engine is not a part of the module

    @property
    def engine(self) -> Engine:
        return self._engine[0]

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.engine(*arguments, **keywords)

    def _get_name(self) -> str:
        return self.module._get_name()  # libraries look the kind of a model up by it


class EngineOptimizer(Optimizer):
    """The optimizer as other libraries take it: settings are the user's optimizer's own, a step is the engine's."""

    def __init__(self, engine: Engine, stepped: Callable[[StepResult], None]):
        assert engine.optimizer is not None
        self.engine, self.stepped = engine, stepped
        self.defaults, self.state = engine.optimizer.defaults, engine.optimizer.state
        self.param_groups = engine.optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ConfigError("a closure cannot be evaluated again on sharded gradients; call step() without one")
        result = self.engine.step()
        if result is not None:
            self.stepped(result)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: each step begins with gradients of zero."""

    def state_dict(self) -> dict[str, Any]:
        """Settings alone: the state is in the engine's checkpoints."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {"state": {}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})


class Bridge:
    """Makes an Accelerator's methods act on an engine that comes later.

    Attributes:
        grad_norm: 0-d, of the step that is under way; filled in when the optimizer steps.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.engine: Engine | None = None
        self.grad_norm = torch.zeros(())
        if getattr(accelerator, "scaler", None) is not None:
            accelerator.scaler = None  # fp16's loss scale is the engine's
        accelerator.backward = self.backward
        accelerator.clip_grad_norm_ = self.clip_grad_norm
        self._unwrap, accelerator.unwrap_model = accelerator.unwrap_model, self.unwrap_model
        self._state_dict, accelerator.get_state_dict = accelerator.get_state_dict, self.get_state_dict

    def attach(self, engine: Engine) -> tuple[EngineModel, EngineOptimizer]:
        self.engine = engine
        model = EngineModel(engine)
        self.accelerator._models.append(model)
        return model, EngineOptimizer(engine, self.stepped)

    def backward(self, loss: Tensor, **keywords: Any) -> None:
        engine = self._attached()
        with contextlib.nullcontext() if self.accelerator.sync_gradients else engine.no_sync():
            engine.backward(loss / self.accelerator.gradient_accumulation_steps)

    def clip_grad_norm(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """Gradients are clipped when the optimizer steps; the norm is in what is returned then."""
        if norm_type != 2:
            raise ConfigError(f"clip_grad_norm_ with norm_type={norm_type}: only the L2 norm is there, norm_type=2")
        if self.accelerator.sync_gradients:
            self._attached().train_step.clip_norm = 0.0 if max_norm == float("inf") else float(max_norm)
            self.grad_norm = torch.zeros(())
        return self.grad_norm

    def unwrap_model(self, model: Any, *arguments: Any, **keywords: Any) -> Any:
        return model.module if isinstance(model, EngineModel) else self._unwrap(model, *arguments, **keywords)

    def get_state_dict(self, model: Any, *arguments: Any, **keywords: Any) -> Any:
        return model.engine.state_dict() if isinstance(model, EngineModel) else self._state_dict(model, **keywords)

    def stepped(self, result: StepResult) -> None:
        self.grad_norm.fill_(result.grad_norm)
        for optimizer in self.accelerator._optimizers:
            if isinstance(optimizer.optimizer, EngineOptimizer):
                optimizer._is_overflow = result.skipped  # schedulers are not stepped then

    def _attached(self) -> Engine:
        if self.engine is None:
            raise ConfigError("no model was given to megatron_ds.integrations.accelerate.prepare() yet")
        return self.engine


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, config: Configuration = None
) -> tuple[EngineModel, Any]:
    """The model and the optimizer for Accelerate's loop, on an engine (``model.engine``).

    Args:
        config: as for :func:`megatron_ds.initialize`. Accumulation and clipping are the loop's.
    """
    settings, _ = read_config(config)
    bridge = Bridge(accelerator)
    engine = initialize(model, for_a_loop(settings, accelerator.device), optimizer)
    wrapped, stepper = bridge.attach(engine)
    return wrapped, accelerator.prepare(stepper)


def for_a_loop(config: EngineConfig, device: torch.device) -> EngineConfig:
    """The configuration for a loop that accumulates by itself and divides its losses."""
    said = {key: getattr(config, key) for key in ("micro_batch", "global_batch") if getattr(config, key) is not None}
    if said or config.accumulation not in (None, 1):
        raise ConfigError(f"batch sizes are the loop's here: remove {', '.join([*said] or ['accumulation'])}")
    return config.model_copy(update={"losses": "sum", "accumulation": 1, "device": device.type})
