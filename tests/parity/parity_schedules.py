"""Schedules of the parity rows that the library does not generate: several stages a rank, weight gradients apart."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from megatron_ds.pipeline.action import Action, Op
from megatron_ds.pipeline.placement import Placement
from megatron_ds.pipeline.schedule import Schedule
from megatron_ds.pipeline.schedules import build_schedule


def schedule_of_row(name: str, placement: Placement, num_micro_batches: int, split_backward: bool) -> Schedule:
    """``gpipe`` or ``1f1b``, the latter by :func:`greedy_1f1b` where a rank holds several stages."""
    kind = "looped" if placement == Placement.looped(placement.pp, placement.chunks) else "v"
    if name == "gpipe" or placement.chunks == 1:
        schedule = build_schedule(name, placement.pp, num_micro_batches, placement.chunks, kind)
    else:
        schedule = greedy_1f1b(placement, num_micro_batches)
    return schedule.with_actions(map(split, schedule)) if split_backward else schedule


def split(actions: Iterable[Action]) -> list[Action]:
    """Each weight gradient right after the next backward of its rank, and those of the last stage's two later."""
    made: list[Action] = []
    waiting: deque[Action] = deque()
    for action in actions:
        made.append(action)
        if action.op is Op.B:
            waiting.append(Action(action.stage, Op.W, action.micro_batch))
            while len(waiting) > (2 if action.stage % 2 else 1):
                made.append(waiting.popleft())
    return made + list(waiting)


def greedy_1f1b(placement: Placement, num_micro_batches: int) -> Schedule:
    """What is ready, a backward before a forward, in the order in which it became so; one action a rank and a step.

    That order is the same at both ends of a link. At most ``num_stages`` micro-batches are under way.
    """
    last = placement.num_stages - 1
    forwards: list[deque[Action]] = [deque() for _ in range(placement.pp)]
    backwards: list[deque[Action]] = [deque() for _ in range(placement.pp)]
    done: list[list[Action]] = [[] for _ in range(placement.pp)]
    forwards[placement.rank_of(0)].extend(Action(0, Op.F, i) for i in range(num_micro_batches))
    under_way = 0
    while any(forwards) or any(backwards):
        step = []
        for rank in range(placement.pp):
            if backwards[rank]:
                step.append(backwards[rank].popleft())
            elif forwards[rank]:
                # A new micro-batch comes only when another one is through; what has begun goes on.
                begun = next((action for action in forwards[rank] if action.stage > 0), None)
                new = forwards[rank][0] if under_way < placement.num_stages else None
                action = begun or new
                if action is not None:
                    forwards[rank].remove(action)
                    step.append(action)
        assert step, "nothing is ready"
        for action in step:
            done[placement.rank_of(action.stage)].append(action)
            stage, i = action.stage, action.micro_batch
            under_way += (action.op is Op.F and stage == 0) - (action.op is Op.B and stage == 0)
            if action.op is Op.F and stage < last:
                forwards[placement.rank_of(stage + 1)].append(Action(stage + 1, Op.F, i))
            elif action.op is Op.F:
                backwards[placement.rank_of(last)].append(Action(last, Op.B, i))
            elif stage > 0:
                backwards[placement.rank_of(stage - 1)].append(Action(stage - 1, Op.B, i))
    return Schedule.of(done, placement, num_micro_batches)
