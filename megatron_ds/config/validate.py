"""The one pass over everything in a configuration that has to fit together; each family checks its own sections."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ds.config.pipeline import pipeline_faults
from megatron_ds.config.schema import BaseRunConfig
from megatron_ds.config.unused import PRETRAINING, unused_faults
from megatron_ds.config.zero import zero_faults
from megatron_ds.errors import ConfigError, itemised, multiples_around
from megatron_ds.mesh import MeshShape

MOST_MICRO_BATCHES = 1 << 16
"""Of a step: the schedule lists and checks each."""


def validate(config: BaseRunConfig, world_size: int, needs_data: bool = True) -> MeshShape:
    """The one pass over everything that has to fit together. Returns the mesh; raises ConfigError with all faults.

    ``needs_data``: the run reads samples, so that it must be said where they come from.

    Runs before any process group exists and depends on the configuration and the world size alone, so that every
    rank comes to the same verdict.
    """
    mesh = config.mesh
    shape = MeshShape.for_world(world_size, pp=mesh.pp, cp=mesh.cp, tp=mesh.tp, dp=mesh.dp)
    faults = [
        *_mesh_faults(config),
        *config.faults(shape, needs_data),
        *_batch_faults(config, shape),
        *config.optimizer.faults(config.train.steps),
        *_precision_faults(config),
        *_late_check_faults(config),
        *pipeline_faults(config),
        *unused_faults(config, PRETRAINING),
        *zero_faults(config.zero, shape.dp),
    ]
    if faults:
        raise ConfigError(itemised(faults))
    return shape


def _mesh_faults(config: BaseRunConfig) -> Iterator[str]:
    if config.mesh.cp != 1:
        yield f"mesh.cp={config.mesh.cp}: context parallelism is not built yet; use mesh.cp=1"


def _batch_faults(config: BaseRunConfig, shape: MeshShape) -> Iterator[str]:
    train, portion = config.train, config.train.micro_batch * shape.dp
    if train.global_batch % portion:
        yield (
            f"train.global_batch={train.global_batch} is not a multiple of train.micro_batch={train.micro_batch} x "
            f"dp={shape.dp} = {portion} (dp is world_size={shape.world_size} / model-parallel "
            f"{shape.world_size // shape.dp}); use {multiples_around(train.global_batch, portion)}"
        )
    if train.global_batch // portion > MOST_MICRO_BATCHES:
        yield (
            f"train.global_batch={train.global_batch} is {train.global_batch // portion} micro-batches a replica and "
            f"step, of which there may be {MOST_MICRO_BATCHES}; raise train.micro_batch"
        )
    yield from _ramp_faults(config, portion)


def _precision_faults(config: BaseRunConfig) -> Iterator[str]:
    precision = config.precision
    if precision.min_loss_scale > precision.initial_loss_scale:
        yield (
            f"precision.initial_loss_scale={precision.initial_loss_scale:g} is below "
            f"precision.min_loss_scale={precision.min_loss_scale:g}"
        )


def _late_check_faults(config: BaseRunConfig) -> Iterator[str]:
    """Why the host cannot learn one step late whether a step was skipped, or would wait for the device all the same."""
    if not config.train.late_check:
        return
    what, off = "train.late_check", "use --train.no-late-check"
    if config.precision.dtype == "fp16" and config.precision.loss_scale is None:
        yield (
            f"{what} with precision.dtype='fp16': the step after an overflow begins before the dynamic loss scale has "
            f"halved; set precision.loss_scale, use precision.dtype='bf16', or {off}"
        )
    if config.zero.stage == 3:
        yield f"{what} with zero.stage=3, which compares the order of gathers at each update; use stage 2, or {off}"
    if config.zero.offload_optimizer.device != "none":
        yield (
            f"{what} with zero.offload_optimizer.device={config.zero.offload_optimizer.device!r}: the host waits for "
            f"what it fetches and takes back; keep the state on the device, or {off}"
        )
    if config.log.record_steps:
        yield f"{what} with log.record_steps, for which the host waits for each action; leave it out, or {off}"


def _ramp_faults(config: BaseRunConfig, portion: int) -> Iterator[str]:
    """Why the global batch cannot grow as ``train.batch_ramp`` says; ``portion`` is what divides every batch."""
    train = config.train
    if train.batch_ramp is None:
        return
    start, increment, _ = train.batch_ramp
    what = f"train.batch_ramp={list(train.batch_ramp)} (start, increment, samples)"
    if start >= train.global_batch or (train.global_batch - start) % increment:
        yield (
            f"{what} does not lead to train.global_batch={train.global_batch}: {start} plus whole increments of "
            f"{increment} must make it; use an increment that divides {train.global_batch - start}"
            if start < train.global_batch
            else f"{what} starts at or above train.global_batch={train.global_batch}; start below it"
        )
    for name, value in (("start", start), ("increment", increment)):
        if value % portion:
            yield (
                f"{what}: the {name} {value} is not a multiple of train.micro_batch={train.micro_batch} x "
                f"dp={portion // train.micro_batch} = {portion}; use {multiples_around(value, portion)}"
            )
