"""Passes: schedule in, schedule out. They add and place transfers; they never reorder compute."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from megatron_ds.errors import ScheduleError
from megatron_ds.pipeline.action import Action, Op
from megatron_ds.pipeline.placement import Placement
from megatron_ds.pipeline.schedule import Schedule


def make_ready(schedule: Schedule) -> Schedule:
    """The schedule as it runs: with transfers, each receive posted one compute action ahead of its use."""
    return hoist_receives(add_communication(schedule))


def add_communication(schedule: Schedule) -> Schedule:
    """Each send right after the compute that produces it, each receive right before the compute that needs it.

    Stage 0 receives no activation and the last stage no gradient; two stages of one rank hand over without a
    transfer. A schedule that already has transfers raises ScheduleError.
    """
    if schedule.has_transfers:
        raise ScheduleError("the schedule already has transfers; pass the one that build_schedule returned")
    return schedule.with_actions(
        [action for compute in actions for action in _with_transfers(compute, schedule.placement)]
        for actions in schedule
    )


def _with_transfers(compute: Action, placement: Placement) -> Iterator[Action]:
    stage, micro_batch = compute.stage, compute.micro_batch
    below = stage > 0 and placement.crosses(stage - 1)
    above = stage + 1 < placement.num_stages and placement.crosses(stage)
    if compute.op is Op.F and below:
        yield Action(stage, Op.RECV_F, micro_batch)
    if compute.op is Op.B and above:
        yield Action(stage, Op.RECV_B, micro_batch)
    yield compute
    if compute.op is Op.F and above:
        yield Action(stage, Op.SEND_F, micro_batch)
    if compute.op is Op.B and below:
        yield Action(stage, Op.SEND_B, micro_batch)


def hoist_receives(schedule: Schedule, ahead: int = 1) -> Schedule:
    """Post each receive ``ahead`` compute actions earlier, so that the transfer runs while the rank computes.

    At most ``ahead + 1`` received buffers wait at once. The order of the receives among themselves stays, so both
    ends of every link still agree. Hoisting twice by one is hoisting by two.

    It makes sense only because a receive is *posted*: with receives that block, hoisted 1F1B deadlocks (one rank
    waits for the next forward before it sends a gradient, its neighbour for that gradient before it sends the
    forward).
    """
    if ahead < 0:
        raise ScheduleError(f"ahead={ahead} would post receives after their use; use 0 or more")
    return schedule.with_actions(_hoist(actions, ahead) for actions in schedule)


def _hoist(actions: Sequence[Action], ahead: int) -> list[Action]:
    before: defaultdict[int, list[Action]] = defaultdict(list)  # compute slot -> receives posted right before it
    computes_seen = 0
    for action in actions:
        if action.op.is_receive:
            before[max(0, computes_seen - ahead)].append(action)
        computes_seen += action.op.is_compute

    hoisted: list[Action] = []
    slot = 0
    for action in actions:
        if action.op.is_receive:
            continue
        if action.op.is_compute:
            hoisted += before.pop(slot, [])
            slot += 1
        hoisted.append(action)
    return hoisted + [action for receives in before.values() for action in receives]
