"""From a configuration and a mesh to what one rank runs: stages, schedule, executor, optimizer, step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from megatron_ds.config import BaseRunConfig, PipelineConfig
from megatron_ds.data.loader import BatchRamp
from megatron_ds.errors import ConfigError
from megatron_ds.layers.float8_layers import describe, device_fault, use_float8
from megatron_ds.layers.float8_recipe import recipes_of, weights_kept
from megatron_ds.mesh import Axis, Mesh, MeshShape
from megatron_ds.optim.learning_rate import learning_rate
from megatron_ds.optim.loss_scaler import LossScaler
from megatron_ds.pipeline.executor import Executor
from megatron_ds.pipeline.graphs import CudaRecorder, MicroBatchGraphs
from megatron_ds.pipeline.layer_split import split_layers
from megatron_ds.pipeline.passes import make_ready
from megatron_ds.pipeline.placement import Placement
from megatron_ds.pipeline.schedule import Schedule
from megatron_ds.pipeline.schedules import activation_bound, build_schedule
from megatron_ds.pipeline.stage import StageModule, StageSpan, stage_spans
from megatron_ds.pipeline.validator import validate as validate_schedule
from megatron_ds.train.step import TrainStep
from megatron_ds.train.task import Task
from megatron_ds.zero.optimizer import ZeroOptimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class RankRuntime:
    """One rank's share of a run."""

    stages: dict[int, nn.Module]
    executor: Executor
    optimizer: ZeroOptimizer
    step: TrainStep
    scaler: LossScaler


def batch_ramp(config: BaseRunConfig) -> BatchRamp:
    """The global batch by samples consumed; without a ramp-up it is one size."""
    final = config.train.global_batch
    start, increment, samples = config.train.batch_ramp or (final, 1, 1)
    return BatchRamp(start, increment, samples, final)


def num_micro_batches(config: BaseRunConfig, shape: MeshShape) -> int:
    """Micro-batches a replica of a step with the full global batch."""
    return config.train.global_batch // (config.train.micro_batch * shape.dp)


def spans_of(config: PipelineConfig, task: Task, pp: int) -> list[StageSpan]:
    """The layers of every stage. The embedding and the head count as cost where the split is by cost."""
    num_stages = pp * config.chunks
    if config.layers_per_stage is not None:
        return stage_spans(split_layers(task.num_layers, num_stages, mode=list(config.layers_per_stage)))
    return stage_spans(
        split_layers(
            task.num_layers,
            num_stages,
            layer_cost=task.costs.block,
            first_cost=task.costs.embedding,
            last_cost=task.costs.head,
            mode=config.split,
        )
    )


def build(config: BaseRunConfig, mesh: Mesh, task: Task, device: torch.device | None = None) -> RankRuntime:
    """Everything one rank runs, with initial weights set.

    Args:
        device: where parameters live; the meta device builds the layout without memory (a dry run).
    """
    device = device or mesh.device
    pp = mesh.pp.size
    replica_batch = config.train.micro_batch * mesh.shape.dp
    schedules = [schedule_of(config.pipeline, pp, size // replica_batch) for size in batch_ramp(config).sizes()]
    stages, shared = make_stages(config, mesh, task, device)
    for stage in stages.values():
        cast(StageModule, stage).initialize(config.seed)
    optimizer = ZeroOptimizer(
        [parameter for stage in stages.values() for parameter in stage.named_parameters()],
        mesh,
        config.zero,
        config.optimizer,
        shared_over=shared,
        root=root_of(stages),
        stage_of=stage_numbers(stages),
    )
    optimizer.seed = config.seed
    if config.compile:
        for stage in stages.values():
            cast(StageModule, stage).compile_blocks()
    executor = Executor(
        schedules[-1],
        stages,
        pp=mesh.pp,
        pp_back=mesh.pp_back,
        against=mesh.against_the_flow() if schedules[-1].placement.chunks > 1 else None,
        activation_shape=partial(task.activation_shape, mesh),
        dtype=DTYPES[config.precision.dtype],
        device=device,
        gradients=optimizer,
        other_sizes=schedules[:-1],
    )
    if getattr(config.train, "cuda_graphs", False):
        executor.graphs = MicroBatchGraphs(optimizer.reducer.main_grads(), CudaRecorder(device))
    scaler = LossScaler.from_config(config.precision)
    step = TrainStep(
        executor,
        optimizer,
        mesh,
        scaler,
        clip_norm=config.optimizer.clip_norm,
        count=task.count,
        rate=lambda update: learning_rate(config.optimizer, update, config.train.steps),
        # Where stage 3 frees weights between uses, they are not kept in FP8 either.
        weights_fixed=partial(
            weights_kept, recipes_of(stages.values()), optimizer.gatherer is None or config.zero.keep_whole
        ),
    )
    return RankRuntime(stages, executor, optimizer, step, scaler)


def low_precision(config: BaseRunConfig, shape: MeshShape, task: Task, device: torch.device | None) -> list[str]:
    """Which layers compute in FP8, as a note for the user, and whether they can; laid out without memory.

    Args:
        device: where the run computes; None: not known, as in a dry run.

    Raises:
        ConfigError: a layer or the device cannot do it.
    """
    precision = config.precision
    if precision.fp8 == "none":
        return []
    span = StageSpan(0, task.num_layers)
    mesh = Mesh.described(MeshShape(tp=shape.tp), 0)
    model = task.make_stage(span, mesh, torch.device("meta"), DTYPES[precision.dtype])
    note, faults = describe(model, precision)
    if device is not None:
        faults += filter(None, [device_fault(device, precision)])
    if faults:
        raise ConfigError("\n".join(faults))
    return [note]


def make_stages(
    config: BaseRunConfig, mesh: Mesh, task: Task, device: torch.device
) -> tuple[dict[int, nn.Module], list[tuple[nn.Parameter, Axis]]]:
    """This rank's stages by number, and the parameters of which a stage on another rank holds a copy."""
    spans = spans_of(config.pipeline, task, mesh.pp.size)
    placement = Placement.of(config.pipeline.placement, mesh.pp.size, config.pipeline.chunks)
    dtype = DTYPES[config.precision.dtype]
    stages = {
        number: task.make_stage(spans[number], mesh, device, dtype) for number in placement.stages_of(mesh.pp.rank)
    }
    if config.precision.fp8 != "none":
        for stage in stages.values():
            use_float8(stage, config.precision, mesh.cp)
    return stages, _tie_embeddings(stages, mesh)


def root_of(stages: Mapping[int, nn.Module]) -> nn.Module:
    """The one module that has all parameters of a rank's stages."""
    first, *others = stages.values()
    return nn.ModuleList(stages.values()) if others else first


def stage_numbers(stages: Mapping[int, nn.Module]) -> dict[int, int]:
    """By the ``id`` of a parameter, the first stage that holds it: the last one whose backward pass uses it."""
    return {id(p): number for number in sorted(stages, reverse=True) for p in stages[number].parameters()}


def schedule_of(config: PipelineConfig, pp: int, micro_batches: int) -> Schedule:
    """The schedule of a step with ``micro_batches`` a replica, proved to be sound."""
    schedule = build_schedule(config.schedule, pp, micro_batches, config.chunks, config.placement)
    validate_schedule(make_ready(schedule), activation_bound(config.schedule, schedule))
    return schedule


def _tie_embeddings(stages: Mapping[int, nn.Module], mesh: Mesh) -> list[tuple[nn.Parameter, Axis]]:
    """Parameters of which a stage on another rank holds a copy, with the axis of those ranks.

    Those are the embedding, where the output head on another stage is tied to it. Where both stages are on this rank
    they share the parameter itself.
    """
    tied = [cast(Any, stage) for stage in stages.values() if getattr(stage, "shares_embedding", False)]
    if len(tied) == 2:
        tied[1].embedding = tied[0].embedding
        return []
    return [(tied[0].embedding.weight, mesh.embedding)] if tied else []
