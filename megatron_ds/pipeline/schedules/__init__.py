"""The schedules by name. Each is a pure generator in a file of its own, with the activation bound it promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_ds.errors import ConfigError, nearest
from megatron_ds.pipeline.action import Action
from megatron_ds.pipeline.placement import Placement, PlacementKind
from megatron_ds.pipeline.schedule import Schedule
from megatron_ds.pipeline.schedules import gpipe, one_f_one_b


@dataclass(frozen=True)
class Generator:
    """A schedule as two pure functions of ``(rank, placement, num_micro_batches)``.

    Attributes:
        actions: the compute actions of one rank, in order.
        max_in_flight: the most micro-batches whose activations that rank holds at once; the validator holds
            ``actions`` to it.
        several_stages: whether a rank may hold more than one stage.
    """

    actions: Callable[[int, Placement, int], Iterator[Action]]
    max_in_flight: Callable[[int, Placement, int], int]
    several_stages: bool


SCHEDULES: Mapping[str, Generator] = MappingProxyType(
    {
        "gpipe": Generator(gpipe.actions, gpipe.max_in_flight, several_stages=True),
        "1f1b": Generator(one_f_one_b.actions, one_f_one_b.max_in_flight, several_stages=False),
    }
)


def generator_of(name: str) -> Generator:
    """The generator called ``name``. Raises ConfigError when there is none."""
    if name not in SCHEDULES:
        raise ConfigError(
            f"unknown pipeline schedule {name!r}{nearest(name, SCHEDULES)} (known: {', '.join(SCHEDULES)})"
        )
    return SCHEDULES[name]


def build_schedule(
    name: str, pp: int, num_micro_batches: int, chunks: int = 1, placement: PlacementKind = "looped"
) -> Schedule:
    """The compute actions of every pipeline rank; :func:`~megatron_ds.pipeline.passes.make_ready` adds the transfers.

    Args:
        name: a key of :data:`SCHEDULES`.
        pp: pipeline ranks.
        num_micro_batches: micro-batches of one optimizer step.
        chunks: model chunks (stages) a rank holds.
        placement: how the stages lie on the ranks.

    Raises:
        ConfigError: an unknown name, a number below 1, or more chunks than the schedule knows how to interleave.
    """
    generator = generator_of(name)
    where = Placement.of(placement, pp, chunks)
    if num_micro_batches < 1:
        raise ConfigError(f"num_micro_batches={num_micro_batches} is no pipeline; use at least 1")
    if chunks != 1 and not generator.several_stages:
        several = ", ".join(known for known, other in SCHEDULES.items() if other.several_stages)
        raise ConfigError(
            f"schedule {name!r} runs one model chunk a rank, not chunks={chunks}; use chunks=1, or one of: {several}"
        )
    return Schedule.of(
        (generator.actions(rank, where, num_micro_batches) for rank in range(pp)), where, num_micro_batches
    )


def activation_bound(name: str, schedule: Schedule) -> list[int]:
    """The most micro-batches in flight that the generator called ``name`` promises of its schedule, per rank."""
    bound = generator_of(name).max_in_flight
    return [bound(rank, schedule.placement, schedule.num_micro_batches) for rank in range(len(schedule))]
