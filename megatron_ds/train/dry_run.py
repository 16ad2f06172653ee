"""Lay out any rank of any mesh on one process, without memory: its stages, its exact bytes, the pipeline's bubble.

The stages are built on the meta device over a mesh without process groups, and laid out by the code that lays out the
real run's, at 8 ranks or 16,384.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_ds.config import BaseRunConfig, validate
from megatron_ds.errors import ConfigError
from megatron_ds.mesh import MeshShape
from megatron_ds.pipeline.passes import make_ready
from megatron_ds.pipeline.simulate import Costs, simulate
from megatron_ds.pipeline.stage import StageSpan
from megatron_ds.train.build import low_precision, num_micro_batches, schedule_of, spans_of
from megatron_ds.train.rank_bytes import RankAccount, account_of
from megatron_ds.train.task import Task


@dataclass(frozen=True)
class DryRun:
    """What one rank of the run would be.

    Attributes:
        account: its bytes; activations are estimated for a GPU unless the configuration says CPU.
        bubble: idle share of the pipeline's time, from the layers' FLOPs, a backward at twice a forward.
        notes: what the configuration chose by a rule, such as which layers compute in FP8.
    """

    config: BaseRunConfig
    shape: MeshShape
    rank: int
    spans: list[StageSpan]
    account: RankAccount
    bubble: float
    seconds: float
    notes: list[str]

    @cached_property
    def places(self) -> Mapping[str, Mapping[str, int]]:
        """Bytes between steps by kind and place: ``device``, ``host``, ``disk``."""
        return self.account.layout.bytes().memory

    @cached_property
    def bytes(self) -> dict[str, int]:
        """The same by kind: parameters, gradients, master weights, optimizer state."""
        return self.account.layout.bytes().by_kind

    @cached_property
    def local_parameters(self) -> int:
        """Elements on this rank."""
        return sum(info.numel for info in self.account.layout.parameters)

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
                *(self._stage(stage) for stage in self.account.stages),
                "layers a stage: " + " ".join(str(s.last - s.first) for s in self.spans),
                f"parameters on this rank: {self.local_parameters:,}",
                *_table({**self.bytes, "total": self.total_bytes}),
                *self._offloaded(),
                *self._activations(),
                *self._transient(),
                *self._fullest(),
                f"schedule: {self.config.pipeline.schedule}, {batches} micro-batches, at most {self.account.in_flight} "
                f"in flight on this rank, bubble {self.bubble:.1%} of the time",
                *self.notes,
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
        found, in_flight = self.account.activations, self.account.in_flight
        if found is None:
            return ["  (activations are not known of this model)"]
        device = "a CPU" if self.config.device == "cpu" else "a GPU"
        kinds = {"stored": found.of(in_flight), "recompute peak": found.recompute_peak}
        once = f", {found.loss:,} of them once" if found.loss and in_flight > 1 else ""
        return [
            f"activations on {device}, estimated: {found.stored:,} bytes a micro-batch x {in_flight} in flight{once}",
            *_table({kind: size for kind, size in kinds.items() if size or kind == "stored"}),
        ]

    def _transient(self) -> list[str]:
        there = {kind: size for kind, size in self.account.transient_bytes().items() if size}
        return ["for a moment, at most:", *_table(there)] if there else []

    def _fullest(self) -> list[str]:
        without = " without activations" if self.account.activations is None else ""
        total = {"in all": self.account.total("device")}
        return [f"on the device at the fullest moment{without} (--dry-run --layouts compares layouts):", *_table(total)]

    def _offloaded(self) -> list[str]:
        """What lies where, if not all of it is on the device."""
        lines = []
        for place in ("device", "host", "disk"):
            there = {kind: places[place] for kind, places in self.places.items() if places[place]}
            lines += [f"  on the {place}:", *_table({**there, "total": sum(there.values())})] if there else []
        return lines if any(places["host"] + places["disk"] for places in self.places.values()) else []


def _table(sizes: dict[str, int]) -> list[str]:
    return [f"  {kind:<14}  {size:>18,} bytes  {size / 2**30:9.3f} GiB" for kind, size in sizes.items()]


def dry_run(config: BaseRunConfig, task: Task, world_size: int, rank: int = 0) -> DryRun:
    """Lay out rank ``rank`` of a job of ``world_size`` ranks.

    Raises:
        ConfigError: what the real run would raise, and a rank outside the world.
    """
    start = time.perf_counter()
    shape = validate(config, world_size, needs_data=False)
    if not 0 <= rank < world_size:
        raise ConfigError(f"--rank {rank} is not a rank of --world-size {world_size}; use 0 to {world_size - 1}")
    notes = low_precision(config, shape, task, device=None)
    account = account_of(config, task, shape, rank)
    spans = spans_of(config.pipeline, task, shape.pp)
    batches = num_micro_batches(config, shape)
    forward = [
        task.costs.block * (span.last - span.first)
        + task.costs.embedding * span.embedding
        + task.costs.head * span.head
        for span in spans
    ]
    schedule = schedule_of(config.pipeline, shape.pp, batches)
    timeline = simulate(make_ready(schedule), Costs(forward=forward, backward=[2 * cost for cost in forward]))
    return DryRun(config, shape, rank, spans, account, timeline.bubble_fraction, time.perf_counter() - start, notes)
