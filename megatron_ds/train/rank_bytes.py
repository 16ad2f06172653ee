"""Bytes of any rank of any layout of a run, by kind and place: a pure function, without process groups or memory.

The stages are built on the meta device over a mesh without groups, and laid out as the optimizer does it. The dry run,
the advice and the planner read the result. A search over many layouts keeps one :class:`StageBook`, so that each kind
of stage is built once.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import nn

from megatron_ds.config import BaseRunConfig
from megatron_ds.layers.float8_layers import kept_bytes
from megatron_ds.mesh import Axis, Mesh, MeshShape
from megatron_ds.optim.factory import as_rule
from megatron_ds.pipeline.placement import Placement
from megatron_ds.pipeline.schedules import generator_of
from megatron_ds.pipeline.stage import Activations, StageSpan
from megatron_ds.train.build import make_stages, num_micro_batches, root_of, spans_of, stage_numbers
from megatron_ds.train.task import Task, largest_activations
from megatron_ds.zero.allocate import data_axes
from megatron_ds.zero.buckets import ParameterInfo
from megatron_ds.zero.layout import ZeroLayout
from megatron_ds.zero.units import choose_units, describe


@dataclass(frozen=True)
class RankAccount:
    """What one rank of a run needs.

    Attributes:
        stages: those of the rank, by number.
        micro_batches: of a step. in_flight: those whose activations the rank keeps at once.
        activations: of one micro-batch; None: not known of this model.
        fp8_weights: bytes of weights that a step keeps in FP8 besides.
    """

    layout: ZeroLayout
    stages: tuple[int, ...]
    micro_batches: int
    in_flight: int
    activations: Activations | None
    fp8_weights: int = 0

    def bytes(self) -> dict[str, dict[str, int]]:
        """By kind, then ``device``, ``host`` or ``disk``; at the fullest moment of a step.

        Kinds: ``parameters``, ``gradients``, ``master``, ``optimizer`` and ``staging`` exactly; ``activations`` as the
        model estimates them, with what exists while one part is recomputed; at most ``whole gradients`` and ``whole
        parameters`` of buckets that are sharded otherwise; ``weights in FP8``.
        """
        held = self.layout.bytes(self.micro_batches)
        found = {kind: dict(places) for kind, places in held.memory.items()}
        found["staging"] = {"host": held.staging}
        for kind, size in self.transient_bytes().items():
            found[kind] = {"device": size}
        if self.activations is not None:
            stored = self.activations.of(self.in_flight)
            found["activations"] = {"device": stored + self.activations.recompute_peak}
        return found

    def transient_bytes(self) -> dict[str, int]:
        """At most, on the device, besides what is held: whole buckets, and weights in FP8."""
        sizes = self.layout.transient_bytes(self.micro_batches)
        return {**{f"whole {kind}": size for kind, size in sizes.items()}, "weights in FP8": self.fp8_weights}

    def total(self, place: str) -> int:
        return sum(places.get(place, 0) for places in self.bytes().values())


class StageBook:
    """Descriptions of the parameters of pipeline stages, which ranks and layouts have in common.

    The blocks of a model are alike, so that a stage's parameters depend on the number of its blocks, on whether it has
    the embedding and the head, and on the size of tp.

    Attributes:
        built: how often the stages of a rank have been built.
    """

    def __init__(self) -> None:
        self._stages: dict[Hashable, tuple[dict[int, nn.Module], list[tuple[nn.Parameter, Axis]]]] = {}
        self._found: dict[Hashable, tuple[ParameterInfo, ...]] = {}

    @property
    def built(self) -> int:
        return len(self._stages)

    def parameters(
        self, config: BaseRunConfig, task: Task, mesh: Mesh, spans: list[StageSpan], shard_ranks: int
    ) -> tuple[ParameterInfo, ...]:
        """Of the stages ``spans`` of this rank, in units for ``shard_ranks`` if ZeRO's stage is 3."""
        kinds = tuple((span.last - span.first, span.embedding, span.head) for span in spans)
        stage_key = (config.model, config.precision, config.mesh.sequence_parallel, mesh.tp.size, kinds)
        zero = config.zero
        gathers = zero.stage == 3 and (shard_ranks > 1 or zero.offload_parameters.device != "none")
        key = (stage_key, config.optimizer, zero.persistence_threshold if gathers else None)
        if key not in self._found:
            if stage_key not in self._stages:
                self._stages[stage_key] = make_stages(config, mesh, task, torch.device("meta"))
            stages, shared_over = self._stages[stage_key]
            root = root_of(stages)
            parameters = list(dict.fromkeys(root.parameters()))
            shared = {id(parameter): number for number, (parameter, _) in enumerate(shared_over)}
            units = choose_units(zero, shard_ranks, root, ())
            rule = as_rule(config.optimizer, parameters, mesh.tp)
            infos = describe(parameters, units, zero.persistence_threshold, rule, shared, stage_numbers(stages))
            self._found[key] = tuple(infos)
        return self._found[key]


def account_of(
    config: BaseRunConfig, task: Task, shape: MeshShape, rank: int, book: StageBook | None = None
) -> RankAccount:
    """What rank ``rank`` of a mesh of that shape needs.

    Raises:
        ConfigError: the model cannot be cut in this way.
    """
    mesh = Mesh.described(shape, rank)
    placement = Placement.of(config.pipeline.placement, shape.pp, config.pipeline.chunks)
    numbers = placement.stages_of(mesh.pp.rank)
    all_spans = spans_of(config.pipeline, task, shape.pp)
    spans = [all_spans[number] for number in numbers]
    axes = {over: (shard.size, copies.size) for over, (shard, copies) in data_axes(mesh, config.zero).items()}
    infos = (book or StageBook()).parameters(config, task, mesh, spans, axes[()][0])
    batches = num_micro_batches(config, shape)
    freed = not config.zero.keep_whole and any(info.unit is not None for info in infos)
    specs = [] if freed else [(info.spec, _kept_copies(info, axes[info.sharded_over][0])) for info in infos]
    return RankAccount(
        ZeroLayout.plan(infos, config.zero, axes),
        tuple(numbers),
        batches,
        generator_of(config.pipeline.schedule).max_in_flight(mesh.pp.rank, placement, batches),
        largest_activations(task, spans, shape.tp, "cpu" if config.device == "cpu" else "cuda"),
        kept_bytes(specs, config.precision),
    )


def _kept_copies(info: ParameterInfo, shard_ranks: int) -> int:
    """Copies in FP8 that a step keeps of a weight besides what is gathered."""
    if info.float8 is None or (shard_ranks == 1 and info.unit is None):
        return 2
    return 0 if info.unit is None and info.float8.codes == 2 else 1
