"""DeepSpeed's engine by its own names, as a module around this library's engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_ds.engine import Engine
from megatron_ds.errors import ConfigError, EngineError
from megatron_ds.integrations.deepspeed.links import link, unlink
from megatron_ds.integrations.deepspeed.tags import TaggedCheckpoints
from megatron_ds.integrations.engine_module import EngineModel, EngineOptimizer, require_one_schedule
from megatron_ds.train.step import StepResult


class DeepSpeedEngine(TaggedCheckpoints, EngineModel):
    """What ``deepspeed.initialize`` gives: the model, in a loop of forward, :meth:`backward`, :meth:`step`.

    A name that is not here is the model's own.

    Attributes:
        engine: this library's engine. optimizer, lr_scheduler, training_dataloader: as ``initialize`` returns them.
        micro_steps: calls of :meth:`step`.
        config: as it was given to ``initialize``.
    """

    def __init__(self, engine: Engine, config: Any, trains: bool):
        super().__init__(engine)
        self.config, self._trains = config, trains
        self.optimizer = DeepSpeedOptimizer(self) if trains else None
        self.lr_scheduler: Any = engine.lr_scheduler
        self.training_dataloader: Any = None
        self.micro_steps = 0
        self._boundary: bool | None = None  # as the script has said
        self._applied = False
        link(engine, engine.module.parameters())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    # Training

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Adds up gradients of ``loss / gradient_accumulation_steps``, and returns that; as often as wanted a step.

        Args:
            scale_wrt_gas: False takes the loss as it is.
        """
        self._require_trains()
        scaled = loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss
        with self.engine.no_sync():  # whether another pass follows is known in step() alone
            return self.engine.backward(scaled, retain_graph)

    def _require_trains(self) -> None:
        if not self._trains:
            raise EngineError(
                "this engine has no optimizer; give deepspeed.initialize() optimizer=, or its configuration one"
            )

    def step(self, lr_kwargs: Any = None) -> None:
        """Updates the model at the boundary of gradient accumulation; counts a micro-batch otherwise."""
        result: StepResult | None = None
        if self.optimizer is not None:
            require_one_schedule(self.engine, self.optimizer)
        if self.is_gradient_accumulation_boundary():
            result = self.engine.step(partial=True)
        elif self.engine.has_gradients:  # not where zero_grad() has dropped those of this micro-batch
            self.engine.step()
        self._applied = result is not None and not result.skipped
        self.micro_steps += 1

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next :meth:`step` updates."""
        if self._boundary is not None:
            return self._boundary
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """The script says from now on which steps update."""
        self._boundary = is_boundary

    def was_step_applied(self) -> bool:
        """Whether the last :meth:`step` changed the weights."""
        return self._applied

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """As it is anyway: gradients are reduced when :meth:`step` needs them, from stage 2 on after each pass."""
        yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.engine.zero_grad(set_to_none)

    def train(self, mode: bool = True) -> DeepSpeedEngine:
        super().train(mode)
        self.engine.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeepSpeedEngine:
        """``to()``, ``cuda()``, ``half()``, ...: nothing where the model is that already."""
        for parameter in self.engine.module.parameters():
            before = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            after = fn(before)
            if after.device != before.device or after.dtype != before.dtype:
                raise EngineError(
                    f"the engine's model is in {before.dtype} on {before.device} and cannot be moved to {after.dtype} "
                    f"on {after.device}; convert it before deepspeed.initialize(), or use fp16.enabled or bf16.enabled"
                )
        return self

    def compile(self, backend: Any = "inductor", compile_kwargs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Compiles the model in place."""
        self.engine.module.compile(backend=backend, **(compile_kwargs or {}))

    @property
    def is_compiled(self) -> bool:
        return self.engine.module._compiled_call_impl is not None

    def destroy(self) -> None:
        """Give the model back, whole, as it is trained."""
        unlink(self.engine.module.parameters())
        self.engine.close()

    # What it is

    @property
    def device(self) -> torch.device:
        return self.engine.mesh.device

    @property
    def global_rank(self) -> int:
        return self.engine.mesh.rank

    @property
    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", 0))

    @property
    def world_size(self) -> int:
        return self.engine.mesh.world.size

    @property
    def dp_world_size(self) -> int:
        return self.engine.mesh.data.size

    @property
    def global_steps(self) -> int:
        """Steps with an update, those skipped for NaN or Inf included."""
        return self.engine.steps

    @property
    def skipped_steps(self) -> int:
        return self.engine.skipped

    @property
    def global_samples(self) -> int:
        return self.global_steps * self.train_batch_size()

    def train_batch_size(self) -> int:
        """Samples an update, over all ranks."""
        return _known(self.engine.sizes.global_batch, "train_batch_size")

    def train_micro_batch_size_per_gpu(self) -> int:
        return _known(self.engine.sizes.micro_batch, "train_micro_batch_size_per_gpu")

    def gradient_accumulation_steps(self) -> int:
        return self.engine.sizes.accumulation

    def gradient_clipping(self) -> float:
        return self.engine.config.optimizer.clip_norm

    def zero_optimization(self) -> bool:
        return self.zero_optimization_stage() > 0

    def zero_optimization_stage(self) -> int:
        return self.engine.config.zero.stage

    def zero_optimization_partition_gradients(self) -> bool:
        return self.zero_optimization_stage() >= 2

    def zero_optimization_partition_weights(self) -> bool:
        return self.zero_optimization_stage() == 3

    def fp16_enabled(self) -> bool:
        return self._dtype_is("fp16")

    def bfloat16_enabled(self) -> bool:
        return self._dtype_is("bf16")

    def _dtype_is(self, name: str) -> bool:
        return not self.engine.config.keeps_dtype and self.engine.config.precision.dtype == name

    def loss_scale(self) -> float:
        return self.engine.train_step.scaler.scale

    def get_lr(self) -> list[float]:
        """Of the next update, of each of the optimizer's groups."""
        return [float(group["lr"]) for group in self._groups()]

    def get_mom(self) -> list[Any]:
        """Betas or momentum of the next update, of each group."""
        return [group.get("betas", group.get("momentum")) for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        _ = self.engine.learning_rate  # sets what a schedule of the configuration makes of it
        return self.engine.optimizer.param_groups if self.engine.optimizer is not None else []

    def get_global_grad_norm(self) -> float | None:
        """Of the last update, before clipping; None before the first."""
        return None if self.engine.last is None else self.engine.last.grad_norm

    # Weights

    def state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:  # type: ignore[override]
        """Whole, on all ranks, under the names that a module around the model has."""
        return {f"module.{name}": value for name, value in self.module_state_dict().items()}

    def module_state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Tensor]:
        """Whole, on all ranks, under the model's own names."""
        return self.engine.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes what :meth:`state_dict` gave, on all ranks the same."""
        return self.load_module_state_dict(
            {name.removeprefix("module."): value for name, value in state_dict.items()}, strict
        )

    def load_module_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """Takes what :meth:`module_state_dict` gave, on all ranks the same."""
        with self.engine.gathered(write=True):
            return self.engine.module.load_state_dict(state_dict, strict)


class DeepSpeedOptimizer(EngineOptimizer):
    """The optimizer of a :class:`DeepSpeedEngine`: its groups are the torch optimizer's own."""

    def __init__(self, engine: DeepSpeedEngine):
        super().__init__(engine.engine, lambda result: None)
        self._deepspeed = engine.step
        self.optimizer = engine.engine.optimizer

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ConfigError("a closure cannot be evaluated again on sharded gradients; call step() without one")
        self._deepspeed()

    @property
    def loss_scale(self) -> float:
        return self.engine.train_step.scaler.scale

    cur_scale = loss_scale

    @property
    def overflow(self) -> bool:
        """Whether the last update was skipped for NaN or Inf."""
        return self.engine.last is not None and self.engine.last.skipped


class ConfiguredScheduler:
    """The learning rate schedule of the configuration, to be read: the engine steps it with each update."""

    def __init__(self, engine: DeepSpeedEngine):
        self._engine = engine

    def get_last_lr(self) -> list[float]:
        return self._engine.get_lr()

    get_lr = get_last_lr

    @property
    def last_batch_iteration(self) -> int:
        """Updates so far, counted as DeepSpeed counts them: -1 before the first."""
        return self._engine.engine.zero.count - 1

    def state_dict(self) -> dict[str, int]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def step(self, last_batch_iteration: int | None = None) -> None:
        raise EngineError("the engine steps this schedule after each update; remove lr_scheduler.step()")

    def load_state_dict(self, sd: Mapping[str, Any]) -> None:
        raise EngineError("this schedule goes by the engine's updates; engine.load_checkpoint() sets it")


def _known(number: int | None, key: str) -> int:
    if number is None:
        raise ConfigError(f"{key}() is not known: the configuration has no {key}, and not the sizes that give it")
    return number
