"""A pipeline schedule: one object that is generated, validated, priced, drawn and run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_ds.errors import ScheduleError
from megatron_ds.pipeline.action import Action, Op
from megatron_ds.pipeline.placement import Placement


@dataclass(frozen=True)
class Schedule:
    """What each pipeline rank does, in order, in one optimizer step.

    Attributes:
        actions: of every rank, in order; with transfers once :mod:`~megatron_ds.pipeline.passes` has added them.
        placement: which rank holds which stage.
        num_micro_batches: micro-batches of the step, numbered from 0.
    """

    actions: tuple[tuple[Action, ...], ...]
    placement: Placement
    num_micro_batches: int

    @staticmethod
    def of(
        actions: Iterable[Iterable[Action]], placement: Placement | None = None, num_micro_batches: int | None = None
    ) -> Schedule:
        """A schedule from lists of actions, one a rank.

        What is not given follows from the actions: a looped placement of as many stages as they name, and as many
        micro-batches.
        """
        ranks = tuple(tuple(rank) for rank in actions)
        if not ranks:
            raise ScheduleError("the schedule has no rank; give one list of actions a rank")
        found = [action for rank in ranks for action in rank]
        if placement is None:
            stages = 1 + max((action.stage for action in found), default=0)
            placement = Placement.looped(len(ranks), -(-stages // len(ranks)))
        if placement.pp != len(ranks):
            raise ScheduleError(
                f"the placement is of {placement.pp} ranks and the schedule of {len(ranks)}; give one list of actions "
                "for each rank of the placement"
            )
        if num_micro_batches is None:
            num_micro_batches = 1 + max((action.micro_batch for action in found), default=0)
        return Schedule(ranks, placement, num_micro_batches)

    def with_actions(self, actions: Iterable[Iterable[Action]]) -> Schedule:
        """The same placement and micro-batches with other actions."""
        return replace(self, actions=tuple(tuple(rank) for rank in actions))

    def __iter__(self) -> Iterator[tuple[Action, ...]]:
        """Rank by rank."""
        return iter(self.actions)

    def __len__(self) -> int:
        """Pipeline ranks."""
        return len(self.actions)

    def __getitem__(self, rank: int) -> tuple[Action, ...]:
        return self.actions[rank]

    @property
    def num_stages(self) -> int:
        return self.placement.num_stages

    @property
    def has_transfers(self) -> bool:
        return any(not action.op.is_compute for rank in self.actions for action in rank)

    def compute_only(self) -> Schedule:
        """The schedule without its transfers."""
        return self.with_actions([action for action in rank if action.op.is_compute] for rank in self.actions)

    def links(self) -> list[tuple[int, int, Op]]:
        """``(source rank, target rank, send operation)`` of every link that a schedule with transfers uses, sorted."""
        found = {
            (rank, self.placement.rank_of(action.counterpart.stage), action.op)
            for rank, actions in enumerate(self.actions)
            for action in actions
            if action.op.is_send
        }
        return sorted(found)


def in_flight(actions: Iterable[Action]) -> list[int]:
    """How many micro-batches' activations one rank holds after each of its actions, over all its stages.

    A forward takes them; the backward frees them, or the weight gradient in a schedule that has one apart (it needs
    the same inputs). A received activation that waits for its forward is not counted.
    """
    actions = list(actions)
    frees = Op.W if any(action.op is Op.W for action in actions) else Op.B
    counts, held = [], 0
    for action in actions:
        held += (action.op is Op.F) - (action.op is frees)
        counts.append(held)
    return counts


def peak_in_flight(actions: Sequence[Action]) -> int:
    """The most activations in flight on a rank that runs ``actions``."""
    return max(in_flight(actions), default=0)
