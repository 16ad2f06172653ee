"""Hugging Face's ``Trainer`` on the engine. One changed import::

    from megatron_ds.integrations.transformers import Trainer, TrainingArguments

``TrainingArguments(deepspeed=...)`` takes a DeepSpeed dictionary or JSON file, with ``"auto"`` filled in as they
do, and needs no ``deepspeed`` installed; or this library's own configuration, as a dictionary or a TOML file. An
optimizer there has from the training arguments what it does not say (rate, decay, betas, warm-up of a schedule). What
the Trainer saves is a folder for ``from_pretrained`` with, in a checkpoint, an ``engine/`` from which training resumes
on any number of ranks. Start with ``torchrun``.

Subclasses of the Trainer and of its arguments, such as TRL's, are bases beside these::

    class GRPOTrainer(Trainer, trl.GRPOTrainer): ...

    @dataclass
    class GRPOConfig(TrainingArguments, trl.GRPOConfig): ...
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from megatron_ds.comm.together import together
from megatron_ds.config.engine import EngineConfig, validate_engine
from megatron_ds.deepspeed_json import auto_values, from_deepspeed, is_deepspeed
from megatron_ds.engine import Engine, initialize, read_config
from megatron_ds.engine.assemble import rate_of, torch_optimizer
from megatron_ds.engine.pretrained import saves
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.integrations.accelerate import (
    ENGINE,
    Bridge,
    for_a_loop,
    hidden_size,
    with_precision,
)
from megatron_ds.integrations.engine_module import EngineModel
from megatron_ds.train.build import DTYPES


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """The Trainer's arguments, where ``deepspeed`` is a configuration of the engine."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Keeps the defaults of a base beside this one, such as ``trl.GRPOConfig``.

        A dataclass takes each field from its first base, and this one has all of transformers' with their defaults: a
        ``learning_rate`` of 5e-5 where GRPO's is 1e-6.
        """
        super().__init_subclass__(**keywords)
        if TrainingArguments not in cls.__bases__:
            return
        beside = cls.__mro__[cls.__mro__.index(TrainingArguments) + 1]
        changed = inspect.get_annotations(cls)
        for field in dataclasses.fields(beside):
            if field.name not in changed and field.name in TrainingArguments.__dataclass_fields__:
                changed[field.name] = field.type
                setattr(cls, field.name, copy.copy(field))
        cls.__annotations__ = changed

    def __post_init__(self) -> None:
        # The base class would import deepspeed to read it.
        self.engine_config: Any = vars(self)["deepspeed"]
        self.deepspeed = None
        super().__post_init__()


class Trainer(transformers.Trainer):
    """The Trainer, with its model trained by an engine (``trainer.engine``, from :meth:`train` on)."""

    engine: Engine | None = None
    model: Any
    optimizer: Any
    lr_scheduler: Any
    _own_optimizer: Any = None  # made of the configuration, as the next
    _own_scheduler: Any = None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self._bridge = Bridge(self.accelerator)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        self._check()
        self._settings = self._read(max_steps)
        self._check_full_eval()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self._has_schedule and self.lr_scheduler is not self._own_scheduler:
            raise _another("scheduler")
        return prepared

    def _check(self) -> None:
        args = self.args
        if args.load_best_model_at_end and args.save_only_model:
            raise ConfigError(
                "save_only_model=True leaves out what load_best_model_at_end loads, the engine's checkpoints; switch "
                "one of them off"
            )
        if args.auto_find_batch_size:
            raise ConfigError(
                "auto_find_batch_size=True would begin again with a model that an engine has sharded already; set "
                "per_device_train_batch_size to what fits"
            )

    def _check_full_eval(self) -> None:
        dtype, settings = self._full_eval_dtype, self._settings
        own = [p.dtype for p in self.model.parameters()] if settings.keeps_dtype else [DTYPES[settings.precision.dtype]]
        if settings.zero.stage == 3 and dtype is not None and any(o != dtype for o in own if o.is_floating_point):
            name = "bf16" if dtype == torch.bfloat16 else "fp16"
            raise ConfigError(
                f"{name}_full_eval=True would cast the model after training, whose parameters zero.stage=3 has "
                f"sharded; train in it, with {name}=True, use stage 2, or evaluate what save_model() writes"
            )

    @property
    def _full_eval_dtype(self) -> torch.dtype | None:
        """Of evaluation outside of training."""
        args = self.args
        return torch.float16 if args.fp16_full_eval else torch.bfloat16 if args.bf16_full_eval else None

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self.engine is None or model is not self.engine.module:  # which has placed it
            super()._move_model_to_device(model, device)

    def evaluation_loop(self, *arguments: Any, **keywords: Any) -> Any:
        """The Trainer's, without a cast of a model that the engine has in that dtype.

        A Seq2SeqTrainer generates as many tokens on each rank where ranks gather weights from one another.
        """
        args, dtype = self.args, self._full_eval_dtype
        if self.engine is not None and self.engine.config.zero.stage == 3 and args.world_size > 1:
            self._gen_kwargs = {"synced_gpus": True, **getattr(self, "_gen_kwargs", {})}
        if self.engine is None or any(p.dtype != dtype for p in self.model.parameters() if p.is_floating_point()):
            return super().evaluation_loop(*arguments, **keywords)
        before = args.fp16_full_eval, args.bf16_full_eval
        args.fp16_full_eval = args.bf16_full_eval = False
        try:
            return super().evaluation_loop(*arguments, **keywords)
        finally:
            args.fp16_full_eval, args.bf16_full_eval = before

    def _read(self, max_steps: int) -> EngineConfig:
        """The configuration, with what the training arguments say in it."""
        args, source = self.args, getattr(self.args, "engine_config", None)
        auto = auto_values(
            hidden_size=hidden_size(getattr(self.model, "config", None)),
            micro_batch=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            dp=args.world_size,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            clip_norm=args.max_grad_norm,
            fp16=args.fp16 or args.fp16_full_eval,
            bf16=args.bf16 or args.bf16_full_eval,
            warmup_steps=args.get_warmup_steps(max_steps),
            total_steps=max_steps,
        )
        if (isinstance(source, dict) and is_deepspeed(source)) or str(source).endswith(".json"):
            config, notes = from_deepspeed(source or {}, auto, must_match=True)
            config = config.model_copy(update={"micro_batch": None, "global_batch": None, "accumulation": None})
            for note in notes if args.process_index == 0 else ():
                print(f"megatron_ds: {note}", flush=True)
        else:
            config = self._with_arguments(read_config(source)[0], max_steps)
        config = with_precision(config, "bf16" if args.bf16 else "fp16" if args.fp16 else "no")
        said = config.optimizer.clip_norm
        if "clip_norm" in config.optimizer.model_fields_set and said not in (0.0, args.max_grad_norm):
            raise ConfigError(
                f"optimizer.clip_norm={said:g}, but max_grad_norm={args.max_grad_norm:g}; set one of them"
            )
        config = for_a_loop(config.model_copy(update={"steps": max_steps}), args.device)
        validate_engine(config, args.world_size)  # the engine itself does not see the optimizer's settings
        return config

    def _with_arguments(self, config: EngineConfig, max_steps: int) -> EngineConfig:
        """An optimizer of the configuration has from the training arguments what it does not say itself."""
        args, section, named = self.args, config.optimizer, config.torch_optimizer
        shared = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
        if named is not None:
            takes = inspect.signature(getattr(torch.optim, named.name, dict)).parameters
            params = {key: value for key, value in shared.items() if key in takes} | named.params
            return config.model_copy(update={"torch_optimizer": named.model_copy(update={"params": params})})
        if not config.optimizer_settings():
            return config
        unsaid = dict(shared)
        if section.name == "adamw":
            unsaid |= {"beta1": args.adam_beta1, "beta2": args.adam_beta2, "eps": args.adam_epsilon}
        if section.schedule != "constant":
            unsaid["warmup_steps"] = args.get_warmup_steps(max_steps)
        unsaid = {key: value for key, value in unsaid.items() if key not in section.model_fields_set}
        return config.model_copy(update={"optimizer": section.model_copy(update=unsaid)})

    @property
    def _has_schedule(self) -> bool:
        section = self._settings.optimizer
        return self._settings.schedule is not None or section.schedule != "constant" or section.warmup_steps > 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self._settings.has_optimizer:
            named = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
            every = self._settings.decay == "all"
            groups: list[dict[str, Any]] = [
                {"params": [p for _, p in named if every or p.dim() > 1]},
                {"params": [p for _, p in named if not every and p.dim() <= 1], "weight_decay": 0.0},
            ]
            self.optimizer = torch_optimizer(self._settings, [group for group in groups if group["params"]])
            self._own_optimizer = self.optimizer
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None and self._has_schedule:
            factors = _factors(self._settings, self.optimizer)
            self.lr_scheduler = self._own_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factors)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if not training or isinstance(model, EngineModel):
            return model
        settings = self._settings
        if settings.has_optimizer:
            if self.optimizer is not self._own_optimizer:
                raise _another("optimizer")
            # The optimizer was made of them above; to the engine it is simply the caller's.
            settings = settings.without_optimizer()
        settings = settings.model_copy(update={"schedule": None})
        if self.engine is not None:  # of the model before, where model_init makes a new one for each training
            self.engine.close()
        self.engine = initialize(model, settings, self.optimizer)
        wrapped, self.optimizer = self._bridge.attach(self.engine)
        return wrapped

    def _clip_grad_norm(self, model: nn.Module) -> None:
        self._bridge.clip_in_step(None, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Tensor:
        if self.args.max_grad_norm <= 0:
            self._bridge.clip_in_step(None, float("inf"))
        return self._bridge.grad_norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.engine is None:
            super().save_model(output_dir, _internal_call)
            return
        folder = output_dir or self.args.output_dir
        if saves(self.model):
            self.engine.save_pretrained(folder)
        else:
            self._save_by_itself(folder)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_by_itself(self, folder: str) -> None:
        """As the Trainer saves a model of no library, or a Trainer beside this one a model that writes itself."""
        assert self.engine is not None
        state, model = self.engine.state_dict(average=self.engine.keeps_average), self.model
        with self.engine.gathered(), together(self.engine.mesh.world):
            if self.args.should_save:
                # In memory of its own: parameters of the engine are parts of a larger one, which safetensors refuses.
                self.model = copy.deepcopy(model)
                try:
                    for name, parameter in self.model.named_parameters():
                        parameter.data = state[name]
                    self._save(folder, state_dict=state)
                finally:
                    self.model = model

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.engine is not None
        # Also with micro-batches of an incomplete step, where an epoch ends whose length was not known or a callback
        # stops the training: as the Trainer's own checkpoints, it lacks their gradients.
        state = {"lr_scheduler": self.lr_scheduler.state_dict()}
        self.engine.save_checkpoint(Path(output_dir) / ENGINE, state, within_step=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing yet: the engine's checkpoint holds the weights too, what is frozen included."""
        if not (Path(resume_from_checkpoint) / ENGINE).is_dir():
            raise CheckpointError(
                f"{resume_from_checkpoint} has no {ENGINE}/ to resume from: another Trainer wrote it, or this one "
                "with save_only_model=True; load its weights with from_pretrained and train from step 0"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.engine is not None
            self.lr_scheduler.load_state_dict(self.engine.load_checkpoint(Path(checkpoint) / ENGINE)["lr_scheduler"])

    def _load_best_model(self) -> None:
        assert self.engine is not None and self.state.best_model_checkpoint is not None
        self.engine.zero_grad()  # of an incomplete step
        self.engine.load_checkpoint(Path(self.state.best_model_checkpoint) / ENGINE, weights_only=True)


def _another(kind: str) -> ConfigError:
    return ConfigError(
        f"the Trainer was given a {kind} or makes one itself, and the configuration (deepspeed=) has one too, which "
        "would be lost; remove one of them"
    )


def _factors(config: EngineConfig, optimizer: torch.optim.Optimizer) -> list[Callable[[int], float]]:
    """The configuration's learning rate as a LambdaLR takes it, by updates done: of each group, relative to its own."""
    if config.schedule is not None and config.schedule.sets_betas:
        raise ConfigError("the Trainer's scheduler sets learning rates alone; set OneCycle's cycle_momentum to false")
    # As LambdaLR has them: in a second training the rate of a group is what the first one has left.
    rate, bases = rate_of(config), [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    if 0.0 in bases:
        raise ConfigError(
            "learning_rate=0, and the configuration's scheduler sets rates of its own, which a Trainer takes relative "
            "to that; set learning_rate to the largest of them"
        )

    def relative(base: float) -> Callable[[int], float]:
        return lambda done: rate(base, done + 1) / base

    return [relative(base) for base in bases]
