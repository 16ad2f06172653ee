"""From a user's model and a configuration to an engine: ranks, names, dtype, optimizer, step."""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron_ds import comm
from megatron_ds.comm.together import exchange
from megatron_ds.config.engine import BatchSizes, DeepSpeedSchedule, EngineConfig, validate_engine
from megatron_ds.config.read import from_dict, read_toml
from megatron_ds.deepspeed_json import from_deepspeed, is_deepspeed
from megatron_ds.engine.engine import Engine
from megatron_ds.engine.loss_stage import LossStage, is_stage, loss_of_output
from megatron_ds.engine.model_check import check_model
from megatron_ds.engine.model_guard import require_trainable_dtype
from megatron_ds.engine.without_memory import Filler, Weights, dtypes_of, has_memory, take_places
from megatron_ds.engine.wrapped import plain_name, unwrapped
from megatron_ds.errors import ConfigError, RaisedAs, listed
from megatron_ds.kernels.cpu.allocator import keep_freed_memory, map_large_tensors
from megatron_ds.mesh import Mesh, MeshShape, init_process_group
from megatron_ds.optim.deepspeed_schedule import scheduled_betas, scheduled_rate
from megatron_ds.optim.ema import averaged
from megatron_ds.optim.learning_rate import learning_rate
from megatron_ds.optim.loss_scaler import LossScaler
from megatron_ds.optim.torch_rule import TorchRule
from megatron_ds.pipeline.executor import Executor
from megatron_ds.pipeline.schedules import build_schedule
from megatron_ds.shard import ShardSpec, memory_order, spec_of
from megatron_ds.train.alike import SETTINGS, differences, digest
from megatron_ds.train.build import DTYPES
from megatron_ds.train.launch import RankInfo, connect
from megatron_ds.train.step import TrainStep
from megatron_ds.zero.optimizer import ZeroOptimizer

_TENSORS_RELEASED = 0.2
"""Seconds at the end of a script in which gloo's threads release the tensors of its last collective. They take Python's
lock for that, and one that asks for it when Python has ended aborts the process (``terminate called ...``)."""
Configuration = EngineConfig | Mapping[str, Any] | str | Path | None


def initialize(
    model: nn.Module,
    config: Configuration = None,
    optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | Callable[[int], float] | None = None,
    *,
    loss: Callable[[Any, Any], Tensor] = loss_of_output,
    auto: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    weights: Weights = None,
    unit_classes: Sequence[type[nn.Module]] = (),
) -> Engine:
    """An engine that trains ``model`` with ZeRO data parallelism over all ranks of the job.

    The ranks are those of ``torch.distributed``, which is started from torchrun's environment if it was not yet. As in
    DDP, every rank begins with rank 0's parameters and buffers.

    Args:
        model: any module, compiled or not. Its parameters become views of flat buffers; frozen ones are left alone.
        config: an :class:`~megatron_ds.config.engine.EngineConfig`, its fields as a dictionary or a TOML file, or a
            DeepSpeed dictionary or JSON file.
        optimizer: any ``torch.optim`` optimizer over the model's parameters whose update of one depends on no other, or
            what makes one of them. Default: the configuration's.
        lr_scheduler: a torch scheduler of that optimizer, which the engine steps after each update, unless it takes a
            metric (ReduceLROnPlateau): the loop steps that, on all ranks with the same metric, as ``eval_batch`` gives
            it. Or, without ``optimizer``, the learning rate as a function of the update's number, from 1.
        loss: what :meth:`Engine.train_batch` makes of a micro-batch: its mean loss. The default calls the model with it
            and takes ``.loss`` of the output.
        auto: what ``"auto"`` in a DeepSpeed configuration stands for; see ``megatron_ds.deepspeed_json.auto_values``.
        weights: the values of parameters made in ``megatron_ds.empty_parameters()``: a folder of safetensors files,
            or what initialises a module's own parameters. Default: the modules themselves.
        unit_classes: stage 3: classes of modules gathered and freed as one. Default: the members of module lists.
        mesh: of a model that is sharded over tensor-parallel ranks already. Default: all ranks data-parallel.

    Raises:
        ConfigError: on every rank, with every fault of the configuration.
    """
    settings, notes = read_config(config, auto)
    called, model = model, unwrapped(model)
    place = start_ranks(settings)
    mesh = mesh or mesh_of(settings, place)
    sizes = _checked(settings, mesh, is_stage(model))
    parameters, filler = _prepare(model, mesh, settings, weights)
    scaler = _scaler(settings, parameters.values(), notes)
    own = _optimizer(settings, optimizer, [p for p in parameters.values() if p.requires_grad])
    _check_scheduler(lr_scheduler, own)
    rule = TorchRule(own, parameters) if own is not None else None
    rate = _rate(settings, rule, lr_scheduler)
    update = averaged(rule, settings.optimizer) if rule is not None else settings.optimizer
    zero = ZeroOptimizer(
        parameters.items(), mesh, settings.zero, update, root=model, unit_classes=unit_classes, fill=filler
    )
    zero.seed = settings.seed
    if filler is not None:
        filler.fill_rest()
    step = _train_step(settings, sizes, mesh, zero, scaler, rate, called, loss)
    engine = Engine(model, settings, sizes, mesh, zero, step, own, rule, lr_scheduler, place.local_world_size)
    for note in notes if mesh.rank == 0 else ():
        print(f"megatron_ds: {note}", flush=True)
    return engine


def _check_scheduler(lr_scheduler: Any, optimizer: Optimizer | None) -> None:
    if isinstance(lr_scheduler, torch.optim.lr_scheduler.LRScheduler) and lr_scheduler.optimizer is not optimizer:
        raise ConfigError("lr_scheduler is of another optimizer than the one given; give initialize() both")


def read_config(config: Configuration, auto: Mapping[str, Any] | None = None) -> tuple[EngineConfig, list[str]]:
    """The configuration in whatever form it comes, and notes on DeepSpeed keys that have no counterpart."""
    if config is None:
        return EngineConfig(), []
    if isinstance(config, EngineConfig):
        return config, []
    if isinstance(config, Mapping):
        if is_deepspeed(config):
            return from_deepspeed(config, auto)
        return from_dict(EngineConfig, dict(config), "config"), []
    if not isinstance(config, str | Path):
        raise ConfigError(
            f"config is {config!r}, of type {type(config).__name__}; give an EngineConfig, a dictionary, or a path of "
            "a TOML file or a DeepSpeed JSON"
        )
    if str(config).endswith(".json"):
        return from_deepspeed(config, auto)
    return from_dict(EngineConfig, read_toml(config), str(config)), []


def _checked(config: EngineConfig, mesh: Mesh, stage: bool) -> BatchSizes:
    """What each rank computes of a batch. ConfigError on all ranks alike. ``stage``: the model is one of several."""
    if mesh.cp.size > 1 or (mesh.pp.size > 1 and (mesh.tp.size > 1 or not stage)):
        raise ConfigError(
            f"initialize() trains one whole model a rank of mesh.data, and this mesh has pp={mesh.pp.size}, "
            f"cp={mesh.cp.size}; use a mesh of dp and tp, or a family of megatron_ds.models with megatron_ds.train, or "
            "with pp alone a PipelineModule of megatron_ds.integrations.deepspeed"
        )
    sizes = validate_engine(config, mesh.data.size)
    facts = {SETTINGS: config.to_dict()}
    prints = exchange(mesh.world, digest(facts))
    others = [rank for rank, text in enumerate(prints) if text != prints[0]]
    if others:
        settings = [json.loads(text) for text in exchange(mesh.world, json.dumps(facts))]
        raise ConfigError(*differences(f"rank {listed(others)}", settings[others[0]], settings[0]))
    return sizes


def _prepare(
    model: nn.Module, mesh: Mesh, config: EngineConfig, weights: Weights
) -> tuple[dict[str, nn.Parameter], Filler | None]:
    """The model's parameters by name, in their dtype; and what gives values to those that have none yet."""
    if config.keep_freed_memory:
        map_large_tensors()
    check_model(model, gathers=config.zero.stage == 3 and mesh.data.size > 1, ranks=mesh.data.size)
    dtype = None if config.keeps_dtype else DTYPES[config.precision.dtype]
    empty = take_places(model, mesh.device, dtype)
    _place_model(model, mesh, dtype)
    parameters = name_parameters(model, config.decay == "all")
    _take_orders(parameters, mesh)
    _require_trainable(parameters)
    return parameters, Filler(model, config.seed, weights) if empty else None


def name_parameters(model: nn.Module, decay_all: bool = False) -> dict[str, nn.Parameter]:
    """Name to parameter, each once, under the first of its names; a ShardSpec is on each afterwards.

    One that its model has given a spec (as those of ``megatron_ds.models``) keeps it. What an engine before gave it may
    be of another shape or name now.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        spec = getattr(parameter, "shard", None)
        if not isinstance(spec, ShardSpec) or "named_by_engine" in parameter.__dict__:
            parameter.named_by_engine = True  # type: ignore[attr-defined]
            shape = (*parameter.shape, 2) if parameter.is_complex() else tuple(parameter.shape)
            order = () if parameter.is_complex() else memory_order(parameter)
            spec = ShardSpec(plain_name(name), shape, weight_decay=parameter.dim() > 1, order=order)
        parameter.shard = replace(spec, weight_decay=True) if decay_all else spec  # type: ignore[attr-defined]
    return {parameter.shard.name: parameter for parameter in parameters.values()}  # type: ignore[attr-defined]


def _take_orders(parameters: Mapping[str, nn.Parameter], mesh: Mesh) -> None:
    """Every rank lays its parameters out in memory as rank 0 does: they share the same flat buffers."""
    mine = {name: spec_of(p).order for name, p in parameters.items() if spec_of(p).order}
    theirs = json.loads(exchange(mesh.data, json.dumps(mine))[0])
    for name, parameter in parameters.items():
        if (order := tuple(theirs.get(name, ()))) != spec_of(parameter).order:
            parameter.shard = replace(spec_of(parameter), order=order)  # type: ignore[attr-defined]


def _require_trainable(parameters: Mapping[str, nn.Parameter]) -> None:
    taken = [name for name, parameter in parameters.items() if "main_grad" in parameter.__dict__]
    if taken:
        raise ConfigError(
            f"{listed(taken, 3)}: trained by an engine already; call its "
            "close() first, or train what shares parameters in one engine"
        )
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            require_trainable_dtype(name, parameter)
        if parameter.dtype == torch.complex32:
            raise ConfigError(f"{name} is of dtype complex32, with which little can be computed; make it complex64")


def _scaler(config: EngineConfig, parameters: Iterable[nn.Parameter], notes: list[str]) -> LossScaler:
    """Scales the loss where the trained parameters are in fp16, whoever made them so."""
    precision = config.precision
    if not config.keeps_dtype:
        return LossScaler.from_config(precision)
    if any(p.requires_grad and p.dtype == torch.float16 for p in parameters):
        notes.append("the model's parameters are in fp16: the loss is scaled, as with precision.dtype='fp16'")
        return LossScaler.from_config(precision.model_copy(update={"dtype": "fp16"}))
    if precision.loss_scale is not None:
        raise ConfigError(
            f"precision.loss_scale={precision.loss_scale:g} is for fp16, and no trained parameter of the model is; set "
            "precision.dtype='fp16', or leave it out"
        )
    return LossScaler()


def start_ranks(config: EngineConfig) -> RankInfo:
    """This process's place in the job, whose process group is there afterwards."""
    if not dist.is_initialized():
        place = RankInfo.from_environment()
        device = place.device(config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if place.world_size > 1:
            store = connect(place, config.timeout)
            backend = "nccl" if device.type == "cuda" else "gloo"
            init_process_group(backend, place.rank, place.world_size, store, config.timeout)
            atexit.register(time.sleep, _TENSORS_RELEASED)
        return place
    local = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device() if torch.cuda.is_available() else 0))
    return RankInfo(dist.get_rank(), dist.get_world_size(), local, int(os.environ.get("LOCAL_WORLD_SIZE", local + 1)))


def mesh_of(config: EngineConfig, place: RankInfo, pp: int = 1) -> Mesh:
    """All ranks of the job data-parallel, in ``pp`` pipeline stages."""
    device = place.device(config.device)
    if place.world_size > 1 and device.type == "cuda" and "nccl" not in dist.get_backend():
        device = torch.device("cpu")  # whoever made the process group chose it for tensors on the CPU
    return Mesh.create(MeshShape.for_world(place.world_size, pp), device, config.timeout)


@torch.no_grad()
def _place_model(model: nn.Module, mesh: Mesh, dtype: torch.dtype | None) -> None:
    """On the device, in the dtype, and as on rank 0. Buffers keep their dtype: a rotary table must not be rounded."""
    wanted = dtypes_of(model, dtype)
    for parameter in model.parameters():
        if has_memory(parameter):
            parameter.data = parameter.data.to(mesh.device, wanted[parameter])
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(mesh.device, wanted.get(buffer, buffer.dtype))
    for tensor in [*model.parameters(), *model.buffers()]:
        if has_memory(tensor):
            comm.broadcast(tensor.data, mesh.data)


def _optimizer(
    config: EngineConfig,
    given: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None,
    parameters: Sequence[nn.Parameter],
) -> Optimizer | None:
    """The caller's optimizer, or the configuration's from ``torch.optim``; None for our own AdamW and SGD."""
    if given is not None:
        said = config.optimizer_settings() + (["torch_optimizer"] if config.torch_optimizer else [])
        if said:
            raise ConfigError(
                f"an optimizer is given, and the configuration has one too ({', '.join(said)}); remove one of them"
            )
        return given if isinstance(given, Optimizer) else given(parameters)
    if config.torch_optimizer is not None:
        return torch_optimizer(config, parameters)
    if config.schedule is not None and config.schedule.sets_betas and config.optimizer.name == "adamw":
        decayed = [parameter for parameter in parameters if spec_of(parameter).weight_decay]
        others = [parameter for parameter in parameters if not spec_of(parameter).weight_decay]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        return torch_optimizer(config, [group for group in groups if group["params"]])
    return None


def torch_optimizer(config: EngineConfig, parameters: Iterable[Any]) -> Optimizer:
    """The configuration's optimizer as an object of ``torch.optim`` over ``parameters`` or groups of them."""
    section = config.optimizer
    if config.torch_optimizer is not None:
        name, params = config.torch_optimizer.name, dict(config.torch_optimizer.params)
    elif section.name == "adamw":
        name, params = "AdamW", {"lr": section.lr, "betas": (section.beta1, section.beta2), "eps": section.eps}
        params["weight_decay"] = section.weight_decay
    else:
        name, params = "SGD", {"lr": section.lr, "momentum": section.momentum, "weight_decay": section.weight_decay}
    cls = getattr(torch.optim, name, None)
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise ConfigError(f"torch_optimizer.name={name!r} is no optimizer of torch.optim")
    with RaisedAs(ConfigError, f"torch_optimizer.params={params}", TypeError, ValueError):
        return cls(parameters, **params)


def rate_of(config: EngineConfig) -> Callable[[float, int], float]:
    """The configuration's learning rate as a function of the optimizer's own rate and the update's number, from 1."""
    section, schedule = config.optimizer, config.schedule
    if schedule is not None:
        return lambda lr, step: scheduled_rate(schedule, lr, step)
    return lambda _, step: learning_rate(section, step, section.decay_steps or config.steps or 1)


def _train_step(
    config: EngineConfig,
    sizes: BatchSizes,
    mesh: Mesh,
    zero: ZeroOptimizer,
    scaler: LossScaler,
    rate: Callable[[int], float],
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
) -> TrainStep:
    schedule = build_schedule("1f1b", mesh.pp.size, sizes.accumulation)
    device = mesh.device
    executor = Executor(
        schedule,
        {mesh.pp.rank: LossStage(model, loss, DTYPES[config.precision.dtype] if config.cast_inputs else None)},
        pp=mesh.pp,
        pp_back=mesh.pp_back,
        activation_shape=None,  # a stage's output says it itself
        dtype=torch.float32,
        device=device,
        gradients=zero,
    )

    def count(micro_batches: Sequence[Any]) -> Tensor:
        return torch.full((), float(len(micro_batches) if config.losses == "mean" else 1), device=device)

    step = TrainStep(executor, zero, mesh, scaler, clip_norm=config.optimizer.clip_norm, rate=rate, count=count)
    step.after_first = keep_freed_memory if config.keep_freed_memory else None
    return step


def _rate(config: EngineConfig, rule: TorchRule | None, lr_scheduler: Any) -> Callable[[int], float]:
    """The learning rate of an update. An optimizer of torch has it set in its groups, unless a scheduler does."""
    of_config = rate_of(config)
    if rule is None:
        return lr_scheduler if callable(lr_scheduler) else lambda step: of_config(config.optimizer.lr, step)
    if callable(lr_scheduler):
        return _set_by(rule.optimizer, lambda _, step: lr_scheduler(step), None)
    if lr_scheduler is not None or config.schedule is None:
        return lambda step: rule.learning_rate
    return _set_by(rule.optimizer, of_config, config.schedule if config.schedule.sets_betas else None)


def _set_by(
    optimizer: Optimizer, rate: Callable[[float, int], float], betas: DeepSpeedSchedule | None
) -> Callable[[int], float]:
    """A schedule over an optimizer of torch: what it makes of each group's own rate is what the group has."""
    without = [number for number, group in enumerate(optimizer.param_groups) if group.get("lr") is None]
    if without:
        raise ConfigError(
            f"group {without[0]} of {type(optimizer).__name__} has no 'lr' that a schedule could set; give it one, or "
            "remove `schedule` (lr_scheduler)"
        )
    own = [float(group["lr"]) for group in optimizer.param_groups]

    def set_rate(step: int) -> float:
        for lr, group in zip(own, optimizer.param_groups):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate(lr, step))
            else:
                group["lr"] = rate(lr, step)
            if betas is not None and "betas" in group:
                group["betas"] = scheduled_betas(betas, step)
        return float(optimizer.param_groups[0]["lr"])

    return set_rate
