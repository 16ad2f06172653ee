"""From a configuration and a mesh to what one rank runs: stages, schedule, executor, optimizer, step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from megatron_ds.config import PipelineConfig, RunConfig
from megatron_ds.data.ramp import BatchRamp
from megatron_ds.mesh import Axis, Mesh, MeshShape
from megatron_ds.optim.loss_scaler import LossScaler
from megatron_ds.optim.schedule import learning_rate
from megatron_ds.pipeline.action import Schedule
from megatron_ds.pipeline.executor import Executor
from megatron_ds.pipeline.passes import add_communication, hoist_receives
from megatron_ds.pipeline.schedules import build_schedule, generator_of
from megatron_ds.pipeline.split import split_layers
from megatron_ds.pipeline.stage import Model, StageModule, StageSpan, stage_spans
from megatron_ds.pipeline.validate import validate as validate_schedule
from megatron_ds.shard import spec_of
from megatron_ds.shared_memory import SharedExchange
from megatron_ds.train.step import TrainStep
from megatron_ds.zero.optimizer import ZeroOptimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Parts:
    """One rank's share of a run."""

    stages: dict[int, nn.Module]
    executor: Executor
    optimizer: ZeroOptimizer
    step: TrainStep
    scaler: LossScaler


def batch_ramp(config: RunConfig) -> BatchRamp:
    """The global batch by samples consumed; without a ramp-up it is one size."""
    final = config.train.global_batch
    start, increment, samples = config.train.batch_ramp or (final, 1, 1)
    return BatchRamp(start, increment, samples, final)


def num_micro_batches(config: RunConfig, shape: MeshShape) -> int:
    """Micro-batches a replica of a step with the full global batch."""
    return config.train.global_batch // (config.train.micro_batch * shape.dp)


def spans_of(config: PipelineConfig, model: Model, pp: int) -> list[StageSpan]:
    """The layers of every stage. The embedding and the head count as cost where the split is by cost."""
    if config.layers_per_stage is not None:
        return stage_spans(split_layers(model.num_layers, pp, mode=list(config.layers_per_stage)))
    return stage_spans(
        split_layers(
            model.num_layers,
            pp,
            layer_cost=model.costs.block,
            first_cost=model.costs.embedding,
            last_cost=model.costs.head,
            mode=config.split,
        )
    )


def build(config: RunConfig, mesh: Mesh, model: Model, device: torch.device | None = None) -> Parts:
    """Everything one rank runs, with initial weights set.

    Args:
        device: where parameters live; the meta device builds the layout without memory (a dry run).
    """
    device = device or mesh.device
    pp = mesh.pp.size
    replica_batch = config.train.micro_batch * mesh.shape.dp
    schedules = [_schedule(config, pp, size // replica_batch) for size in batch_ramp(config).sizes()]
    span = spans_of(config.pipeline, model, pp)[mesh.pp.rank]
    tp = SharedExchange.on(mesh.tp) if device.type == "cpu" else mesh.tp
    stage = model.make_stage(config, span, tp, device, DTYPES[config.precision.dtype])
    cast(StageModule, stage).initialize(config.seed)
    optimizer = ZeroOptimizer(
        list(stage.named_parameters()),
        mesh,
        config.zero,
        config.optimizer,
        config.precision,
        shared_over=_shared(stage, mesh),
        root=stage,
    )
    if config.compile:
        cast(StageModule, stage).compile_blocks()
    executor = Executor(
        schedules[-1],
        {mesh.pp.rank: stage},
        pp=mesh.pp,
        pp_back=mesh.pp_back,
        activation_shape=cast(StageModule, stage).activation_shape(
            config.train.micro_batch, config.train.sequence_length
        ),
        dtype=DTYPES[config.precision.dtype],
        device=device,
        before_backward=lambda _, last: optimizer.start_backward(last),
        after_backward=lambda _: optimizer.end_backward(),
        other_sizes=schedules[:-1],
    )
    scaler = LossScaler.from_config(config.precision)
    step = TrainStep(
        executor,
        optimizer,
        mesh,
        scaler,
        clip_norm=config.optimizer.clip_norm,
        rate=lambda update: learning_rate(config.optimizer, update, config.train.steps),
    )
    return Parts({mesh.pp.rank: stage}, executor, optimizer, step, scaler)


def _schedule(config: RunConfig, pp: int, micro_batches: int) -> Schedule:
    """The schedule of a step with ``micro_batches``, proved to be sound."""
    schedule = build_schedule(config.pipeline.schedule, pp, micro_batches)
    validate_schedule(
        hoist_receives(add_communication(schedule)),
        micro_batches,
        generator_of(config.pipeline.schedule).max_in_flight,
    )
    return schedule


def _shared(stage: nn.Module, mesh: Mesh) -> list[tuple[nn.Parameter, Axis]]:
    """Parameters of which another stage holds a copy: the embedding, where it is tied across first and last stage."""
    tied = getattr(stage, "shares_embedding", False)
    if mesh.pp.size == 1 or not tied:
        return []
    return [(p, mesh.embedding) for p in stage.parameters() if spec_of(p).name == "embedding.weight"]
