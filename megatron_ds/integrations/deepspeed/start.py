"""``deepspeed.initialize`` and ``deepspeed.add_config_arguments``, with DeepSpeed's arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

import megatron_ds
from megatron_ds.config.engine import EngineConfig
from megatron_ds.deepspeed_json import from_deepspeed, read_values
from megatron_ds.engine.assemble import mesh_of, start_ranks, torch_optimizer
from megatron_ds.errors import ConfigError
from megatron_ds.files import print_line
from megatron_ds.integrations.deepspeed.comm import init_distributed
from megatron_ds.integrations.deepspeed.engine import ConfiguredScheduler, DeepSpeedEngine
from megatron_ds.integrations.deepspeed.pipe import PipelineEngine, PipelineModule
from megatron_ds.integrations.deepspeed.utils import get_z3_leaf_modules
from megatron_ds.mesh import Mesh

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None = None,
    model_parameters: Parameters | nn.Module | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    mesh_param: Any = None,
    config_params: Mapping[str, Any] | str | Path | None = None,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """The engine, its optimizer, a loader of ``training_data`` and the learning rate scheduler.

    Args:
        args: with ``deepspeed_config``, where ``config`` is not given.
        optimizer: over the model's parameters, or what makes one of ``model_parameters``. It is preferred to the
            configuration's, as is ``lr_scheduler``: a torch scheduler, or what makes one of the optimizer.
        model_parameters: what is trained, or groups of it. Default: all parameters that require gradients.
        config, config_params: a DeepSpeed configuration: a dictionary or a JSON file.

    Raises:
        ConfigError: with every fault of the configuration; for ``mpu`` and ``mesh_param``, which have no counterpart.
    """
    if model is None:
        raise ConfigError("deepspeed.initialize() needs model=, an nn.Module")
    if mpu is not None or mesh_param is not None:
        raise ConfigError(
            "mpu= and mesh_param= describe ranks that share a model; use megatron_ds.initialize(mesh=) with layers of "
            "megatron_ds.layers"
        )
    source = _source(args, config, config_params)
    init_distributed(dist_init_required=dist_init_required)
    name, values = read_values(source)
    values = {**values}
    client = [key for key, given in (("optimizer", optimizer), ("scheduler", lr_scheduler)) if given is not None]
    unused = [key for key in client if values.pop(key, None) is not None]
    settings, notes = from_deepspeed(values)
    notes += [f"{key}: not in use, as deepspeed.initialize() was given one" for key in unused]
    settings, mesh = _mesh(settings, model)
    settings, made, trains = _optimizer(settings, optimizer, _parameters(model, model_parameters))
    own_schedule = lr_scheduler is None and settings.schedule is not None and trains
    scheduler = lr_scheduler(made) if callable(lr_scheduler) else lr_scheduler
    leaves = list(dict.fromkeys(type(module) for module in get_z3_leaf_modules(model)))
    inner = megatron_ds.initialize(model, settings, made, scheduler, mesh=mesh, unit_classes=leaves)
    if inner.mesh.rank == 0:
        for note in notes:
            print_line(f"megatron_ds: {name}: {note}")
    kind = PipelineEngine if isinstance(model, PipelineModule) else DeepSpeedEngine
    engine = kind(inner, source, trains)
    if own_schedule:
        engine.lr_scheduler = ConfiguredScheduler(engine)
    if training_data is not None:
        drop_last = values.get("dataloader_drop_last") is True
        engine.training_dataloader = _loader(engine, training_data, collate_fn, drop_last)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _mesh(settings: EngineConfig, model: nn.Module) -> tuple[EngineConfig, Mesh]:
    """The ranks, in as many stages as the model has; and what the settings say of a step's losses."""
    place = start_ranks(settings)
    if not isinstance(model, PipelineModule):
        # backward() divides by the accumulation.
        return settings.model_copy(update={"losses": "sum"}), mesh_of(settings, place)
    mesh = mesh_of(settings, place, model.num_stages)
    model.tie(mesh)
    return settings, mesh


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds ``--deepspeed`` and ``--deepspeed_config``, which ``initialize(args)`` reads."""
    group = parser.add_argument_group("DeepSpeed", "configuration of the engine")
    group.add_argument("--deepspeed", action="store_true", help="Train with the engine; for the script to read.")
    group.add_argument("--deepspeed_config", default=None, type=str, help="DeepSpeed JSON file.")
    return parser


def _source(args: Any, *given: Mapping[str, Any] | str | Path | None) -> Mapping[str, Any] | str | Path:
    found = [one for one in (*given, getattr(args, "deepspeed_config", None)) if one is not None]
    if len(found) != 1:
        raise ConfigError(
            f"deepspeed.initialize() was given {len(found)} configurations; give one, as config=, or as "
            "args.deepspeed_config"
        )
    return found[0]


def _parameters(model: nn.Module, given: Parameters | nn.Module | None) -> list[Any]:
    """Trained parameters, or groups of them. A frozen one in the list is no fault there, and is left out."""
    source = model if given is None else given
    found: list[Any] = list(source.parameters() if isinstance(source, nn.Module) else source)
    if found and isinstance(found[0], dict):
        return [{**group, "params": [p for p in _listed(group["params"]) if p.requires_grad]} for group in found]
    return [parameter for parameter in found if parameter.requires_grad]


def _listed(parameters: Tensor | Iterable[Tensor]) -> Sequence[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _optimizer(
    settings: EngineConfig, given: Optimizer | Callable[[Any], Optimizer] | None, parameters: list[Any]
) -> tuple[EngineConfig, Optimizer, bool]:
    """Settings without an optimizer, the optimizer, and whether there is one: without, the model is only run."""
    plain = settings.without_optimizer()
    if isinstance(given, Optimizer):
        return plain, given, True
    if given is not None:
        return plain, given(parameters), True
    if settings.has_optimizer:
        return plain, torch_optimizer(settings, parameters), True
    return plain.model_copy(update={"schedule": None}), SGD(parameters, lr=0.0), False


def _loader(
    engine: DeepSpeedEngine, data: Dataset[Any], collate_fn: Callable[[list[Any]], Any] | None, drop_last: bool
) -> DataLoader[Any]:
    """Micro-batches of this rank's share of the data: shuffled, but for a pipeline, as in DeepSpeed."""
    axis, shuffle = engine.engine.mesh.data, not isinstance(engine, PipelineEngine)
    iterable = isinstance(data, IterableDataset)
    sampler: Any = None if iterable else DistributedSampler(data, axis.size, axis.rank, shuffle)
    return DataLoader(
        data,
        batch_size=engine.train_micro_batch_size_per_gpu(),
        sampler=sampler,
        collate_fn=collate_fn,
        drop_last=drop_last,
    )
