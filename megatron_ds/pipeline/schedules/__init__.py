"""The schedules by name. Each is a pure generator in a file of its own, with the activation bound it promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_ds.errors import ConfigError, nearest
from megatron_ds.pipeline.action import Action, Schedule
from megatron_ds.pipeline.schedules import gpipe, one_f_one_b


@dataclass(frozen=True)
class Generator:
    """A schedule as two pure functions of ``(rank, pp, num_micro_batches)``.

    Attributes:
        actions: the compute actions of one rank, in order.
        max_in_flight: the most micro-batches whose activations that rank holds at once; the validator holds
            ``actions`` to it.
    """

    actions: Callable[[int, int, int], Iterator[Action]]
    max_in_flight: Callable[[int, int, int], int]


SCHEDULES: Mapping[str, Generator] = MappingProxyType(
    {
        "gpipe": Generator(gpipe.actions, gpipe.max_in_flight),
        "1f1b": Generator(one_f_one_b.actions, one_f_one_b.max_in_flight),
    }
)


def generator_of(name: str) -> Generator:
    """The generator called ``name``. Raises ConfigError when there is none."""
    if name not in SCHEDULES:
        raise ConfigError(
            f"unknown pipeline schedule {name!r}{nearest(name, SCHEDULES)} (known: {', '.join(SCHEDULES)})"
        )
    return SCHEDULES[name]


def build_schedule(name: str, pp: int, num_micro_batches: int, chunks: int = 1) -> Schedule:
    """The compute actions of every pipeline rank; :func:`~megatron_ds.pipeline.passes.add_communication` adds
    the transfers.

    Args:
        name: a key of :data:`SCHEDULES`.
        pp: pipeline ranks.
        num_micro_batches: micro-batches of one optimizer step.
        chunks: model chunks (stages) a rank holds.

    Raises:
        ConfigError: an unknown name, a number below 1, or more chunks than the schedule knows how to interleave.
    """
    generator = generator_of(name)
    for what, value in (("pp", pp), ("num_micro_batches", num_micro_batches), ("chunks", chunks)):
        if value < 1:
            raise ConfigError(f"{what}={value} is no pipeline; use at least 1")
    if chunks != 1:
        raise ConfigError(f"schedule {name!r} runs one model chunk a rank, not chunks={chunks}; use chunks=1")
    return [list(generator.actions(rank, pp, num_micro_batches)) for rank in range(pp)]


def activation_bound(name: str, pp: int, num_micro_batches: int) -> list[int]:
    """The most micro-batches in flight that schedule ``name`` promises, per rank."""
    generator = generator_of(name)
    return [generator.max_in_flight(rank, pp, num_micro_batches) for rank in range(pp)]
