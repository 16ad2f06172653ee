"""Proof that a schedule can run: every check a run would otherwise fail, or hang, on.

The checks go from the shape of the lists to their meaning, and each relies on those before it. An error draws the
schedule with the fault marked.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ds.errors import ScheduleError
from megatron_ds.pipeline.action import Action, Op
from megatron_ds.pipeline.draw import draw_steps
from megatron_ds.pipeline.passes import add_communication
from megatron_ds.pipeline.schedule import Schedule, in_flight
from megatron_ds.pipeline.simulate import Blocked, play

_Places = dict[Action, tuple[int, int]]  # (rank, index in the rank's list)


def validate(schedule: Schedule, max_in_flight: Sequence[int] | None = None, blocking_receives: bool = False) -> None:
    """Raise ScheduleError unless the schedule, with or without transfers, is right.

    What is proved: every action runs on the rank that holds its stage; each stage does the forward and the backward
    of each micro-batch once (and each weight gradient, if there is any), in that order; every hand-over between ranks
    has one send, after what it sends, and one receive, before its use; both ends of a link have its transfers in one
    order; no rank waits for ever; no rank holds more activations than its bound.

    Args:
        max_in_flight: bound on the activations in flight of each rank, as ``activation_bound`` gives it; None: no
            bound.
        blocking_receives: prove more: nothing deadlocks even if a receive stops its rank until the data is there.
            True of what ``add_communication`` returns, not of what ``hoist_receives`` makes of it.
    """
    _check_placement(schedule)
    places = _check_once(schedule)
    _check_order(schedule, places)
    if schedule.has_transfers:
        _check_transfers(schedule, places)
        _check_links(schedule)
    _check_deadlock(schedule, places, blocking_receives)
    if max_in_flight is not None:
        _check_in_flight(schedule, max_in_flight)


def _fail(message: str, schedule: Schedule, *marks: tuple[int, int]) -> ScheduleError:
    return ScheduleError(f"{message}\n{draw_steps(schedule, marks)}")


def _check_placement(schedule: Schedule) -> None:
    """One list of actions a rank, and as many stages on each."""
    placement = schedule.placement
    if placement.pp != len(schedule):
        raise ScheduleError(
            f"the placement is of {placement.pp} ranks and the schedule of {len(schedule)}; give one list of actions "
            "for each rank of the placement"
        )
    held = [len(placement.stages_of(rank)) for rank in range(placement.pp)]
    if not placement.num_stages or held != [placement.chunks] * placement.pp:
        raise ScheduleError(
            f"the placement {list(placement.ranks)} puts {held} stages on the {placement.pp} ranks; every rank holds "
            "as many as every other, at least one"
        )
    for rank, actions in enumerate(schedule):
        for action in actions:
            if not 0 <= action.stage < placement.num_stages:  # cannot be drawn
                raise ScheduleError(
                    f"rank {rank} runs {action}, but the placement has {placement.num_stages} stages, numbered from 0; "
                    "drop it, or place the stage"
                )


def _check_once(schedule: Schedule) -> _Places:
    """No action twice, misplaced or out of range, and no compute action missing."""
    placement, num_micro_batches = schedule.placement, schedule.num_micro_batches
    places: _Places = {}
    for rank, actions in enumerate(schedule):
        for index, action in enumerate(actions):
            here = (rank, index)
            if placement.rank_of(action.stage) != rank:
                raise _fail(
                    f"rank {rank} runs {action}, but stage {action.stage} lives on rank "
                    f"{placement.rank_of(action.stage)} (placement {list(placement.ranks)}); move it there",
                    schedule, here,
                )  # fmt: skip
            if not 0 <= action.micro_batch < num_micro_batches:
                raise _fail(
                    f"rank {rank} runs {action}, but there are {num_micro_batches} micro-batches, numbered from 0; "
                    "drop it, or validate with the number the schedule was made for",
                    schedule, here,
                )  # fmt: skip
            if action in places:
                raise _fail(
                    f"rank {rank} runs {action} twice, as its actions {places[action][1]} and {index}; each action "
                    "runs once, so drop one",
                    schedule, here,
                )  # fmt: skip
            places[action] = here

    ops = [Op.F, Op.B] + [Op.W] * any(action.op is Op.W for action in places)
    for stage in range(placement.num_stages):
        for micro_batch in range(num_micro_batches):
            for op in ops:
                action = Action(stage, op, micro_batch)
                if action not in places:
                    raise _fail(
                        f"{action} is missing: stage {stage} has to run {' and '.join(ops)} of all "
                        f"{num_micro_batches} micro-batches; add it to rank {placement.rank_of(stage)}",
                        schedule, *_nearest(action, places),
                    )  # fmt: skip
    return places


def _nearest(missing: Action, places: _Places) -> list[tuple[int, int]]:
    """Where a missing action would stand: at the same micro-batch of its stage, or the one before or after."""
    stage, op, micro_batch = missing.stage, missing.op, missing.micro_batch
    candidates = [Action(stage, other, micro_batch) for other in (Op.B, Op.F)]
    candidates += [Action(stage, op, micro_batch + offset) for offset in (-1, 1)]
    return [places[action] for action in candidates if action in places][:1]


def _check_order(schedule: Schedule, places: _Places) -> None:
    """On each stage the forward of a micro-batch, then its backward, then its weight gradient."""
    for action, (rank, index) in places.items():
        if action.op is not Op.B and action.op is not Op.W:
            continue
        earlier = Action(action.stage, Op.F if action.op is Op.B else Op.B, action.micro_batch)
        if places[earlier][1] > index:
            raise _fail(
                f"rank {rank} runs {action} before {earlier}, whose result it needs; swap them",
                schedule, (rank, index), places[earlier],
            )  # fmt: skip


def _check_transfers(schedule: Schedule, places: _Places) -> None:
    """A send after what it sends and a receive before its use wherever data changes rank, and nowhere else."""
    wanted = {
        action
        for actions in add_communication(schedule.compute_only())
        for action in actions
        if not action.op.is_compute
    }
    for action in sorted(wanted):
        if action not in places:
            rank = schedule.placement.rank_of(action.stage)
            other = places.get(action.counterpart)
            where = f"its other end is {action.counterpart}" if other else "and so is its other end"
            beside = places[action.producer if action.op.is_send else action.consumer]
            raise _fail(
                f"{action} is missing on rank {rank}: {action.consumer} needs the result of {action.producer}, "
                f"{where}; add both, as add_communication does",
                schedule, beside, *([other] if other else []),
            )  # fmt: skip
    for action, (rank, index) in places.items():
        if action.op.is_compute:
            continue
        if action not in wanted:
            raise _fail(
                f"rank {rank} has {action}, but no data crosses there: stages are 0 to {schedule.num_stages - 1} "
                f"over {len(schedule)} ranks; drop it",
                schedule, (rank, index),
            )  # fmt: skip
        if action.op.is_send and places[action.producer][1] > index:
            raise _fail(
                f"rank {rank} has {action} before {action.producer}, whose result it sends; move it behind",
                schedule, (rank, index), places[action.producer],
            )  # fmt: skip
        if action.op.is_receive and places[action.consumer][1] < index:
            raise _fail(
                f"rank {rank} has {action} after {action.consumer}, which needs what it receives; move it before",
                schedule, (rank, index), places[action.consumer],
            )  # fmt: skip


def _check_links(schedule: Schedule) -> None:
    """Both ends of a link list its transfers in one order: they are matched by order, not by name."""
    rank_of = schedule.placement.rank_of
    sends: dict[tuple[int, int, Op], list[tuple[int, Action]]] = {}
    receives: dict[tuple[int, int, Op], list[tuple[int, Action]]] = {}
    for rank, actions in enumerate(schedule):
        for index, action in enumerate(actions):
            if action.op.is_send:
                link = (rank, rank_of(action.counterpart.stage), action.op)
                sends.setdefault(link, []).append((index, action))
            elif action.op.is_receive:
                link = (rank_of(action.counterpart.stage), rank, action.counterpart.op)
                receives.setdefault(link, []).append((index, action))
    for link, sent in sends.items():
        source, target, op = link
        for number, ((s, send), (r, receive)) in enumerate(zip(sent, receives[link])):
            if send.counterpart != receive:
                what = "activation" if op is Op.SEND_F else "gradient"
                raise _fail(
                    f"{what} {number} from rank {source} to rank {target} is sent as {send} and received as {receive} "
                    f"(which is {receive.counterpart}): transfers of a link match by order, so rank {target} would "
                    "take one micro-batch for another; put both ends in one order",
                    schedule, (source, s), (target, r),
                )  # fmt: skip


def _check_deadlock(schedule: Schedule, places: _Places, blocking_receives: bool) -> None:
    _, blocked = play(schedule, lambda action: float(action.op.is_compute), blocking_receives)
    if blocked:
        cycle = _cycle(blocked)
        raise _fail(
            f"deadlock: {'; '.join(map(str, cycle))}; no rank of this circle can go first, so move what is needed "
            "before what waits",
            schedule, *(places[stop.action] for stop in cycle),
        )  # fmt: skip


def _cycle(blocked: list[Blocked]) -> list[Blocked]:
    """The ranks that wait for one another; those that merely wait for one of them are left out."""
    by_rank = {stop.rank: stop for stop in blocked}
    seen: list[Blocked] = []
    stop = blocked[0]
    while stop not in seen:
        seen.append(stop)
        stop = by_rank[stop.needs_rank]
    return seen[seen.index(stop) :]


def _check_in_flight(schedule: Schedule, max_in_flight: Sequence[int]) -> None:
    if len(max_in_flight) != len(schedule):
        raise ScheduleError(
            f"max_in_flight has {len(max_in_flight)} bounds for the {len(schedule)} ranks of the schedule; give one a "
            "rank"
        )
    for rank, (actions, bound) in enumerate(zip(schedule, max_in_flight)):
        for index, held in enumerate(in_flight(actions)):
            if held > bound:
                raise _fail(
                    f"rank {rank} holds the activations of {held} micro-batches after {actions[index]}, over its bound "
                    f"of {bound}; run a backward before it, or raise the bound if the memory is there",
                    schedule, (rank, index),
                )  # fmt: skip
