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
``backward``, ``no_sync``, ``clip_grad_norm_``, ``clip_grad_value_``, ``unwrap_model``, ``get_state_dict``,
``save_state``, ``load_state``, ``prepare_model``, ``prepare_optimizer`` and ``free_memory``. Schedulers are ordinary
torch schedulers of the returned optimizer; ``register_for_checkpointing`` puts them into ``save_state``, whose folder
holds an engine's checkpoint, for any number of ranks, beside Accelerate's own files. ``mixed_precision`` of the
Accelerator becomes ``precision.dtype``, in which the model's outputs stay: compute a loss of your own with
``outputs.float()``. Its ``GradScalerKwargs`` are the loss scale's settings of fp16, and its ``dynamo_backend`` compiles
the model, in place. A parameter's ``.grad`` cannot be read: it raises, and ``model.engine.get_gradient`` gives the
gradient.
``clip_grad_norm_`` and ``clip_grad_value_`` clip the gradient that the optimizer steps with, as with DeepSpeed, also
where the loop calls them after each micro-batch: Accelerate alone would clip there what has been accumulated so far.
One accelerator trains one model, and after ``free_memory()`` another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, GradScalerKwargs
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from megatron_ds.config import PrecisionConfig
from megatron_ds.config.engine import EngineConfig
from megatron_ds.deepspeed_json import auto_values
from megatron_ds.engine import Engine, initialize, read_config
from megatron_ds.engine.assemble import Configuration
from megatron_ds.errors import ConfigError, listed
from megatron_ds.integrations.engine_module import EngineModel, EngineOptimizer, require_one_schedule
from megatron_ds.train.step import StepResult, TrainStep

ENGINE = "engine"
"""Folder of an engine's checkpoint, beside what Accelerate and the Trainer write."""


class Bridge:
    """Makes an Accelerator's methods act on an engine that comes later.

    Attributes:
        grad_norm: 0-d, of the step that is under way; NaN where it is not known before the optimizer steps.

    Raises:
        ConfigError: the accelerator has a bridge already, or was told to shard models itself.
    """

    def __init__(self, accelerator: Accelerator):
        _require_no_sharding(accelerator)
        if isinstance(getattr(accelerator.backward, "__self__", None), Bridge):
            raise ConfigError(
                "this Accelerator trains an engine already, and its backward() can be that of one alone; make an "
                "Accelerator for each model, or call accelerator.free_memory() when the first one is done"
            )
        self.accelerator = accelerator
        self.engine: Engine | None = None
        self.grad_norm = torch.full((), torch.nan)
        self._clip_norm, self._clips = 0.0, False  # the configuration's; and whether the loop asked for its own
        if getattr(accelerator, "scaler", None) is not None:
            accelerator.scaler = None  # fp16's loss scale is the engine's
        accelerator.backward = self.backward
        self._no_sync, accelerator.no_sync = accelerator.no_sync, self.no_sync
        accelerator.clip_grad_norm_ = self.clip_grad_norm
        accelerator.clip_grad_value_ = self.clip_grad_value
        self._unwrap, accelerator.unwrap_model = accelerator.unwrap_model, self.unwrap_model
        self._state_dict, accelerator.get_state_dict = accelerator.get_state_dict, self.get_state_dict
        self._save, accelerator.save_state = accelerator.save_state, self.save_state
        self._load, accelerator.load_state = accelerator.load_state, self.load_state
        self._prepare_model, accelerator.prepare_model = accelerator.prepare_model, self.prepare_model
        self._prepare_optimizer, accelerator.prepare_optimizer = accelerator.prepare_optimizer, self.prepare_optimizer
        self._model: EngineModel | None = None
        self._stepper: EngineOptimizer | None = None
        self._saving = False

    def attach(self, engine: Engine) -> tuple[EngineModel, EngineOptimizer]:
        self.engine, self._clip_norm = engine, engine.train_step.clip_norm
        self._model, self._stepper = EngineModel(engine), EngineOptimizer(engine, self.stepped)
        self._compile(engine.module)
        self.accelerator._models.append(self._model)
        return self._model, self._stepper

    def prepare_model(self, model: Any, *arguments: Any, **keywords: Any) -> Any:
        """The engine's model as it is, whatever is prepared of it; Accelerate's for one that is not trained."""
        evaluates = keywords.get("evaluation_mode")
        if self._model is not None and (model is self._model or model is self._model.module):
            return model if evaluates else self._model
        if self._model is None or evaluates:
            return model if isinstance(model, EngineModel) else self._prepare_model(model, *arguments, **keywords)
        if any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(
                f"{type(model).__name__} was given to prepare() of an Accelerator that trains an engine, whose "
                "backward() is that engine's alone; train both in one engine, as an nn.ModuleDict, or make another "
                "Accelerator; for a model that is not trained, model.requires_grad_(False)"
            )
        return self._prepare_model(model, *arguments, **keywords)

    def prepare_optimizer(self, optimizer: Any, *arguments: Any, **keywords: Any) -> Any:
        """The one that steps the engine, also for the torch optimizer whose settings it has."""
        if self._stepper is not None and optimizer in (self._stepper, self._stepper.engine.optimizer):
            made = [o for o in self.accelerator._optimizers if o.optimizer is self._stepper]
            return made[0] if made else self._prepare_optimizer(self._stepper, *arguments, **keywords)
        return self._prepare_optimizer(optimizer, *arguments, **keywords)

    def _compile(self, module: nn.Module) -> None:
        """As the Accelerator's ``dynamo_backend``, the Trainer's ``torch_compile`` has it; in place, names stay."""
        plugin = self.accelerator.state.dynamo_plugin
        if plugin.backend == DynamoBackend.NO or module._compiled_call_impl is not None:
            return
        if getattr(plugin, "use_regional_compilation", False):
            from accelerate.utils import compile_regions_deepspeed  # as new as the setting

            compile_regions_deepspeed(module, **plugin.to_kwargs())
        else:
            module.compile(**plugin.to_kwargs())

    def backward(self, loss: Tensor, retain_graph: bool | None = None, **keywords: Any) -> None:
        if keywords:
            raise ConfigError(
                f"accelerator.backward({', '.join(keywords)}=) is not supported: an engine's backward pass is of a "
                "loss and of all parameters; of its keywords there is retain_graph alone"
            )
        engine = self._attached()
        with contextlib.nullcontext() if self.accelerator.sync_gradients else engine.no_sync():
            engine.backward(loss / self.accelerator.gradient_accumulation_steps, bool(retain_graph))

    def no_sync(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        return model.no_sync() if isinstance(model, EngineModel) else self._no_sync(model)

    def clip_grad_norm(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """The norm. Gradients are clipped when the optimizer steps, this once."""
        self.clip_in_step(parameters, max_norm, norm_type)
        engine = self._attached()
        # Ranks that have left a join take no part in it: there the step alone says it.
        if self.accelerator.sync_gradients and engine.is_boundary and not engine._join_config.enable:
            self.grad_norm = engine.get_gradient_norm()
        return self.grad_norm

    def clip_in_step(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """The same, without a message of its own: the norm is in what is returned when the optimizer has stepped."""
        if norm_type != 2:
            raise ConfigError(f"clip_grad_norm_ with norm_type={norm_type}: only the L2 norm is there, norm_type=2")
        step = self._to_clip("clip_grad_norm_", "max_norm", max_norm, parameters)
        if step.clip_value is not None:
            raise ConfigError("clip_grad_norm_ after clip_grad_value_ in one step; use one of them")
        if self.accelerator.sync_gradients:
            step.clip_norm = 0.0 if max_norm == float("inf") else float(max_norm)
            self._clips = True
            self.grad_norm = torch.full((), torch.nan, dtype=torch.float64)
        return self.grad_norm

    def clip_grad_value(self, parameters: Any, clip_value: float) -> None:
        """Each element to ``[-clip_value, clip_value]`` when the optimizer steps, this once."""
        step = self._to_clip("clip_grad_value_", "clip_value", clip_value, parameters)
        if self._clips:
            raise ConfigError("clip_grad_value_ after clip_grad_norm_ in one step; use one of them")
        if self.accelerator.sync_gradients:
            step.clip_norm, step.clip_value = 0.0, float(clip_value)

    def _to_clip(self, method: str, name: str, bound: float, parameters: Any) -> TrainStep:
        engine = self._attached()
        if not bound > 0:
            raise ConfigError(f"{method} with {name}={bound:g} leaves nothing of the gradients; use a number above 0")
        if parameters is not None:
            given = {id(p) for p in ([parameters] if isinstance(parameters, Tensor) else parameters)}
            left = [name for name, p in engine.module.named_parameters() if p.requires_grad and id(p) not in given]
            if left:
                raise ConfigError(
                    f"{method} was given some of the parameters, without {listed(left, 5)}, and the engine clips all "
                    "or none; give it model.parameters()"
                )
        return engine.train_step

    def save_state(self, *arguments: Any, **keywords: Any) -> Any:
        """Accelerate's, where the engine's checkpoint takes the place of the model's and the optimizer's files."""
        engine = self._attached()
        engine.require_between_steps("save_state()")

        def save(models: list[Any], weights: list[Any], folder: str) -> None:
            weights[:] = [kept for model, kept in zip(models, weights) if not isinstance(model, EngineModel)]
            engine.save_checkpoint(Path(folder) / ENGINE, keep_last=1)

        self._saving = True
        try:  # after the hooks of the user, who may pop from the same lists
            with _hooked(self.accelerator.register_save_state_pre_hook(save)):
                return self._save(*arguments, **keywords)
        finally:
            self._saving = False

    def load_state(self, *arguments: Any, **keywords: Any) -> Any:
        """What :meth:`save_state` wrote, on any number of ranks."""
        engine = self._attached()
        engine.require_between_steps("load_state()")

        def load(models: list[Any], folder: str) -> None:
            models[:] = [model for model in models if not isinstance(model, EngineModel)]
            engine.load_checkpoint(Path(folder) / ENGINE)

        with _hooked(self.accelerator.register_load_state_pre_hook(load)):
            return self._load(*arguments, **keywords)

    def free_memory(self, *objects: Any) -> Any:
        """Accelerate's, which also closes the engine: another model may be prepared then."""
        if self.engine is not None:
            self.engine.close()
        for name in [
            name for name, value in vars(self.accelerator).items() if getattr(value, "__self__", None) is self
        ]:
            delattr(self.accelerator, name)
        return self.accelerator.free_memory(*objects)

    def unwrap_model(self, model: Any, *arguments: Any, **keywords: Any) -> Any:
        return model.module if isinstance(model, EngineModel) else self._unwrap(model, *arguments, **keywords)

    def get_state_dict(self, model: Any, *arguments: Any, **keywords: Any) -> Any:
        if isinstance(model, EngineModel):
            return {} if self._saving else model.engine.state_dict()
        return self._state_dict(model, *arguments, **keywords)

    def stepped(self, result: StepResult) -> None:
        self.grad_norm.fill_(result.grad_norm)
        step, self._clips = self._attached().train_step, False
        step.clip_norm, step.clip_value = self._clip_norm, None
        for optimizer in self.accelerator._optimizers:
            if isinstance(optimizer.optimizer, EngineOptimizer):
                optimizer._is_overflow = result.skipped  # schedulers are not stepped then
                require_one_schedule(self._attached(), optimizer)

    def _attached(self) -> Engine:
        if self.engine is None:
            raise ConfigError("no model was given to megatron_ds.integrations.accelerate.prepare() yet")
        return self.engine


def _require_no_sharding(accelerator: Accelerator) -> None:
    kind, layout = accelerator.distributed_type, getattr(accelerator.state, "parallelism_config", None)
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"this Accelerator is to shard models itself, by {kind.value}, which an engine does here; leave that out "
            "(fsdp= of training arguments, a plugin, or the answers to `accelerate config`) and set zero.stage"
        )
    if layout is not None and layout.total_size != layout.dp_replicate_size:
        raise ConfigError(
            f"parallelism_config of the Accelerator has {layout.total_size} ranks of which "
            f"{layout.dp_replicate_size} have a batch each, and to an engine all are data-parallel; leave it out and "
            "set zero.stage, or use a model of megatron_ds.models on a mesh"
        )


@contextlib.contextmanager
def _hooked(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, config: Configuration = None, *others: Any
) -> tuple[EngineModel, Any]:
    """The model and the optimizer for Accelerate's loop, on an engine (``model.engine``).

    Args:
        config: as for :func:`megatron_ds.initialize`. Accumulation is the loop's; so is clipping, where it clips.
        others: what ``accelerator.prepare`` takes besides; refused.

    Raises:
        ConfigError: of the configuration; or loaders and schedulers are given.
    """
    if others or isinstance(config, DataLoader | LRScheduler):
        given = listed(type(other).__name__ for other in (config, *others))
        raise ConfigError(
            f"prepare() takes the model, its optimizer and a configuration, not {given}: give loaders to "
            "accelerator.prepare(); a scheduler of the returned optimizer is stepped by the loop"
        )
    settings, notes = read_config(config, _auto(accelerator, model))
    if accelerator.is_main_process:
        for note in notes:
            print(f"megatron_ds: {note}", flush=True)
    settings = _with_scaler(with_precision(settings, accelerator.mixed_precision), accelerator.scaler_handler)
    settings = for_a_loop(settings, accelerator.device)
    bridge = Bridge(accelerator)
    engine = initialize(model, settings, optimizer)
    wrapped, stepper = bridge.attach(engine)
    accelerator.free_memory = bridge.free_memory  # a Trainer calls that before it trains
    return wrapped, accelerator.prepare(stepper)


def _auto(accelerator: Accelerator, model: nn.Module) -> dict[str, Any]:
    """What ``"auto"`` stands for in a DeepSpeed configuration, as Accelerate has it; None is what the loop does."""
    mixed = accelerator.mixed_precision
    of_loop = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    size = hidden_size(getattr(model, "config", None))
    return {
        **auto_values(hidden_size=size, fp16=mixed == "fp16", bf16=mixed == "bf16"),
        **dict.fromkeys(of_loop),
    }


def hidden_size(config: Any) -> int | None:
    """Where Hugging Face looks for it to fill in ``"auto"``."""
    holders: list[Any] = [config, getattr(config, "text_config", None)]
    for holder in holders:
        if getattr(holder, "hidden_size", None):
            return int(holder.hidden_size)
        if getattr(holder, "hidden_sizes", None):
            return int(max(holder.hidden_sizes))
    return None


def with_precision(config: EngineConfig, mixed: str) -> EngineConfig:
    """The Accelerator's ``mixed_precision``, unless the configuration says the same."""
    if mixed == "no":
        return config
    if mixed not in ("bf16", "fp16"):
        raise ConfigError(f"mixed_precision={mixed!r} of the Accelerator is not supported; use 'bf16' or 'fp16'")
    if config.keeps_dtype:
        precision = {**config.precision.model_dump(exclude_unset=True), "dtype": mixed}
        return config.model_copy(update={"precision": PrecisionConfig(**precision)})
    if config.precision.dtype != mixed:
        raise ConfigError(
            f"precision.dtype={config.precision.dtype!r}, but mixed_precision={mixed!r} of the Accelerator, or "
            f"{mixed}=True of the training arguments; set one of them"
        )
    return config


def _with_scaler(config: EngineConfig, scaler: GradScalerKwargs | None) -> EngineConfig:
    """The loss scale that the Accelerator was given for fp16, but for what the configuration says of it."""
    if scaler is None or config.keeps_dtype or config.precision.dtype != "fp16":
        return config
    if (scaler.growth_factor, scaler.backoff_factor) != (2.0, 0.5):
        raise ConfigError(
            f"GradScalerKwargs(growth_factor={scaler.growth_factor:g}, backoff_factor={scaler.backoff_factor:g}): the "
            "loss scale doubles and halves here; leave both at 2 and 0.5"
        )
    given: dict[str, Any] = {"loss_scale": 1.0}
    if scaler.enabled:
        given = {"initial_loss_scale": scaler.init_scale, "loss_scale_window": scaler.growth_interval}
        given["loss_scale_hysteresis"] = 1
    return config.model_copy(
        update={"precision": PrecisionConfig(**given | config.precision.model_dump(exclude_unset=True))}
    )


def for_a_loop(config: EngineConfig, device: torch.device) -> EngineConfig:
    """The configuration for a loop that accumulates by itself and divides its losses."""
    said = {key: getattr(config, key) for key in ("micro_batch", "global_batch") if getattr(config, key) is not None}
    if said or config.accumulation not in (None, 1):
        raise ConfigError(f"batch sizes are the loop's here: remove {', '.join([*said] or ['accumulation'])}")
    return config.model_copy(update={"losses": "sum", "accumulation": 1, "device": device.type})
