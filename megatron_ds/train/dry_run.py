"""Build any rank of any mesh on one process, without memory: its layout, its exact bytes, the pipeline's bubble.

torch's fake process group stands in for the other ranks and the meta device for memory, so that what is counted is
what the real run builds, at 8 ranks or 16,384.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist

from megatron_ds.config import RunConfig, validate
from megatron_ds.errors import ConfigError
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.pipeline.passes import make_ready
from megatron_ds.pipeline.schedules import activation_bound
from megatron_ds.pipeline.simulate import Costs, simulate
from megatron_ds.pipeline.stage import Activations, Model, StageSpan, largest_activations
from megatron_ds.train.build import build, num_micro_batches, schedule_of, spans_of


@dataclass(frozen=True)
class DryRun:
    """What one rank of the run would be.

    Attributes:
        bytes: by kind: parameters, gradients, master weights, optimizer state.
        places: the same by kind and place: ``device``, ``host``, ``disk``.
        local_parameters: elements on this rank.
        activations: of one micro-batch, estimated for a GPU unless the configuration says CPU; None: not known.
        stages: those of the rank, by their place in ``spans``.
        in_flight: micro-batches whose activations this rank keeps at once.
        bubble: idle share of the pipeline's time, from the layers' FLOPs, a backward at twice a forward.
    """

    config: RunConfig
    shape: MeshShape
    rank: int
    spans: list[StageSpan]
    stages: list[int]
    bytes: dict[str, int]
    places: dict[str, dict[str, int]]
    local_parameters: int
    bubble: float
    in_flight: int
    activations: Activations | None
    seconds: float

    @cached_property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    def __str__(self) -> str:
        place = self.shape.coordinates(self.rank)
        batches = num_micro_batches(self.config, self.shape)
        return "\n".join(
            [
                self.shape.draw(mark=self.rank),
                "",
                f"rank {self.rank}: " + ", ".join(f"{axis} {index}" for axis, index in place.items()),
                *(self._stage(stage) for stage in self.stages),
                "layers a stage: " + " ".join(str(s.last - s.first) for s in self.spans),
                f"parameters on this rank: {self.local_parameters:,}",
                *_table({**self.bytes, "total": self.total_bytes}),
                *self._offloaded(),
                *self._activations(),
                "  (communication buffers are not counted)",
                f"schedule: {self.config.pipeline.schedule}, {batches} micro-batches, at most {self.in_flight} "
                f"in flight on this rank, bubble {self.bubble:.1%} of the time",
                f"built in {self.seconds:.1f} s",
            ]
        )

    def _stage(self, stage: int) -> str:
        span = self.spans[stage]
        extras = [name for name, there in (("embedding", span.embedding), ("head", span.head)) if there]
        return f"stage {stage}: layers {span.first} to {span.last - 1}" + (
            f" with {' and '.join(extras)}" if extras else ""
        )

    def _activations(self) -> list[str]:
        if self.activations is None:
            return ["  (activations are not known of this model)"]
        stored, recompute_peak = self.activations.stored, self.activations.recompute_peak
        device = "a CPU" if self.config.device == "cpu" else "a GPU"
        return [
            f"activations on {device}, estimated: {stored:,} bytes a micro-batch x {self.in_flight} in flight",
            *_table({"kept": stored * self.in_flight, **({"recomputed": recompute_peak} if recompute_peak else {})}),
        ]

    def _offloaded(self) -> list[str]:
        """What lies where, if not all of it is on the device."""
        lines = []
        for place in ("device", "host", "disk"):
            there = {kind: places[place] for kind, places in self.places.items() if places[place]}
            lines += [f"  on the {place}:", *_table({**there, "total": sum(there.values())})] if there else []
        return lines if any(places["host"] + places["disk"] for places in self.places.values()) else []


def _table(sizes: dict[str, int]) -> list[str]:
    return [f"  {kind:<10}  {size:>18,} bytes  {size / 2**30:9.3f} GiB" for kind, size in sizes.items()]


def dry_run(config: RunConfig, model: Model, world_size: int, rank: int = 0) -> DryRun:
    """Build rank ``rank`` of a job of ``world_size`` ranks.

    Raises:
        ConfigError: what the real run would raise, and a rank outside the world.
    """
    start = time.perf_counter()
    shape = validate(config, world_size, needs_data=False)
    if not 0 <= rank < world_size:
        raise ConfigError(f"--rank {rank} is not a rank of --world-size {world_size}; use 0 to {world_size - 1}")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if world_size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        mesh = Mesh.create(shape, torch.device("cpu"))
        parts = build(config, mesh, model, torch.device("meta"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    spans = spans_of(config.pipeline, model, shape.pp)
    batches = num_micro_batches(config, shape)
    forward = [
        model.costs.block * (span.last - span.first)
        + model.costs.embedding * span.embedding
        + model.costs.head * span.head
        for span in spans
    ]
    schedule = schedule_of(config.pipeline, shape.pp, batches)
    timeline = simulate(make_ready(schedule), Costs(forward=forward, backward=[2 * cost for cost in forward]))
    return DryRun(
        config,
        shape,
        rank,
        spans,
        sorted(parts.stages),
        parts.optimizer.bytes_report(),
        parts.optimizer.bytes_by_store(),
        sum(parameter.numel() for stage in parts.stages.values() for parameter in stage.parameters()),
        timeline.bubble_fraction,
        activation_bound(config.pipeline.schedule, schedule)[mesh.pp.rank],
        largest_activations(
            model, [spans[stage] for stage in parts.stages], shape.tp, "cpu" if config.device == "cpu" else "cuda"
        ),
        time.perf_counter() - start,
    )
