"""What a schedule costs: its timeline under given costs.

:func:`play` runs a schedule by the rules at the top of ``action.py``. The simulator, the validator's proof that
nothing deadlocks and the drawing in steps are all this one function, so they cannot disagree about what an action
means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_ds.errors import ScheduleError
from megatron_ds.pipeline.action import MAX_SENDS, Action, Op
from megatron_ds.pipeline.passes import add_communication, hoist_receives
from megatron_ds.pipeline.schedule import Schedule
from megatron_ds.pipeline.timeline import Event as Event
from megatron_ds.pipeline.timeline import Timeline as Timeline

Cost = Callable[[Action], float]


@dataclass(frozen=True)
class Costs:
    """Time of each kind of action, in any one unit; a sequence gives one per stage.

    Attributes:
        forward, backward: one micro-batch through one stage. ``backward`` is the whole backward, or only the input
            gradient's part in a schedule that has ``W`` actions.
        weight: the weight gradient's part; used by ``W`` actions alone.
        send: one transfer, by the stage that sends.
    """

    forward: float | Sequence[float] = 1.0
    backward: float | Sequence[float] = 2.0
    weight: float | Sequence[float] = 1.0
    send: float | Sequence[float] = 0.0

    def __call__(self, action: Action) -> float:
        """Time of a compute action, or of the transfer that a send starts; a receive has no cost of its own."""
        match action.op:
            case Op.F:
                name, cost = "forward", self.forward
            case Op.B:
                name, cost = "backward", self.backward
            case Op.W:
                name, cost = "weight", self.weight
            case Op.SEND_F | Op.SEND_B:
                name, cost = "send", self.send
            case _:
                return 0.0
        if not isinstance(cost, Sequence):
            return cost
        if action.stage >= len(cost):
            raise ScheduleError(
                f"{name} costs are given for {len(cost)} stages, and {action} runs on stage {action.stage}; "
                "give one number for every stage, or a single number for all"
            )
        return cost[action.stage]


def simulate(schedule: Schedule, cost: Cost | None = None) -> Timeline:
    """The timeline of a schedule under given costs.

    Args:
        schedule: with transfers, each starts when both its ends are there, so that a receive posted late shows as
            waiting. Without, every receive counts as posted from the start, and data leaves when its compute ends;
            the timeline then holds compute alone.
        cost: time of a compute action or, asked with the send, of a transfer; default ``Costs()``.

    Raises:
        ScheduleError: the schedule cannot finish. ``validate`` says more.
    """
    events, blocked = play(schedule, cost or Costs())
    if blocked:
        raise ScheduleError(
            f"the schedule cannot finish: {'; '.join(map(str, blocked))}. Run validate() on it for a drawing"
        )
    return Timeline(tuple(events))


@dataclass(frozen=True)
class Blocked:
    """A rank that cannot go on: it stands before ``action``, which needs ``needs`` of rank ``needs_rank``."""

    rank: int
    action: Action
    needs: Action
    needs_rank: int

    def __str__(self) -> str:
        return f"rank {self.rank} stands before {self.action}, which needs {self.needs} of rank {self.needs_rank}"


def play(schedule: Schedule, cost: Cost, blocking_receives: bool = False) -> tuple[list[Event], list[Blocked]]:
    """Run a schedule as far as it goes: its events, rank by rank, and the ranks left standing.

    A rank runs until it needs what has not happened yet and is resumed when that happens, so each action is looked
    at about once, in an order that does not change the times.

    Args:
        schedule, cost: as in :func:`simulate`.
        blocking_receives: a receive stops its rank until the data is there, instead of being posted. For the
            question whether it can finish; the time is still counted as waited before the use.
    """
    if schedule.has_transfers:
        return _Player(schedule, cost, blocking_receives).run()
    early = hoist_receives(add_communication(schedule), max(map(len, schedule)))
    events, blocked = _Player(early, cost, False).run()
    return [event for event in events if event.action.op.is_compute], blocked


class _Player:
    """The state of one run. ``done`` is when a compute action ended, or when the data of a receive arrived."""

    def __init__(self, schedule: Schedule, cost: Cost, blocking_receives: bool):
        self.schedule = schedule
        self.cost = cost
        self.blocking_receives = blocking_receives
        self.rank_of = schedule.placement.rank_of
        self.last_stage = schedule.num_stages - 1
        self.clock = [0.0] * len(schedule)
        self.events: list[list[Event]] = [[] for _ in schedule]
        self.done: dict[Action, float] = {}
        self.posted: dict[Action, float] = {}
        self.sent: dict[
            Action, tuple[int, int, float, float]
        ] = {}  # receive -> sender, place in its events, issued, cost
        self.link_free: dict[tuple[int, int, Op], float] = {}
        self.sending: list[list[Action]] = [[] for _ in schedule]  # receives of a rank's sends, the oldest first
        self.waiting: dict[Action, list[int]] = {}  # what has not happened -> the ranks that wait for it
        self.ready = list(range(len(schedule)))

    def run(self) -> tuple[list[Event], list[Blocked]]:
        place = [0] * len(self.schedule)
        while self.ready:
            rank = self.ready.pop()
            actions = self.schedule[rank]
            while place[rank] < len(actions):
                missing = self.step(rank, actions[place[rank]])
                if missing is not None:
                    self.waiting.setdefault(missing, []).append(rank)
                    break
                place[rank] += 1
        blocked = []
        for rank, missing in sorted((rank, missing) for missing, ranks in self.waiting.items() for rank in ranks):
            action = self.schedule[rank][place[rank]]
            # A send waits for a transfer to be taken, everything else for one to be sent.
            needs = missing.producer if missing.op.is_receive and not action.op.is_send else missing
            blocked.append(Blocked(rank, action, needs, self.rank_of(needs.stage)))
        return [event for events in self.events for event in events], blocked

    def step(self, rank: int, action: Action) -> Action | None:
        """Do one action, or return what has to happen first."""
        op = action.op
        now = self.clock[rank]
        events = self.events[rank]
        if op.is_compute:
            inputs = self.inputs(action)
            for needed in inputs:
                if needed not in self.done:
                    return needed
            for needed in inputs:
                there = max(now, self.done[needed])
                if needed.op.is_receive:
                    events.append(Event(rank, needed, now, there))
                now = there
            self.clock[rank] = end = now + self.cost(action)
            events.append(Event(rank, action, now, end))
            self.finish(action, end)
        elif op.is_send:
            sending = self.sending[rank]
            if len(sending) >= MAX_SENDS:
                if sending[0] not in self.done:
                    return sending[0]
                now = self.clock[rank] = max(now, self.done[sending.pop(0)])
            receive = action.counterpart
            sending.append(receive)
            self.sent[receive] = (rank, len(events), now, self.cost(action))
            events.append(Event(rank, action, now, now))  # its end is set when the transfer is matched
            if receive in self.posted:
                self.transfer(action, receive)
        else:
            self.posted.setdefault(action, now)
            if action in self.sent:
                self.transfer(action.counterpart, action)
            if self.blocking_receives and action not in self.done:
                return action
        return None

    def inputs(self, action: Action) -> list[Action]:
        """What a compute action needs: earlier actions of its rank, and the receive of data from another."""
        stage, micro_batch = action.stage, action.micro_batch
        if action.op is Op.W:
            return [Action(stage, Op.B, micro_batch)]
        if action.op is Op.F:
            return [] if stage == 0 else [self.from_stage(stage - 1, Op.F, Op.RECV_F, action)]
        own = Action(stage, Op.F, micro_batch)
        return [own] if stage == self.last_stage else [own, self.from_stage(stage + 1, Op.B, Op.RECV_B, action)]

    def from_stage(self, stage: int, op: Op, receive: Op, action: Action) -> Action:
        if self.rank_of(stage) == self.rank_of(action.stage):
            return Action(stage, op, action.micro_batch)
        return Action(action.stage, receive, action.micro_batch)

    def transfer(self, send: Action, receive: Action) -> None:
        """Run a transfer whose two ends are there. Those of one link come here in the order they were issued."""
        if receive in self.done:
            return
        sender, index, issued, cost = self.sent[receive]
        link = (sender, self.rank_of(receive.stage), receive.op)
        arrival = max(issued, self.posted[receive], self.link_free.get(link, 0.0)) + cost
        self.link_free[link] = arrival
        self.events[sender][index] = Event(sender, send, issued, arrival)
        self.finish(receive, arrival)

    def finish(self, action: Action, time: float) -> None:
        self.done[action] = time
        self.ready += self.waiting.pop(action, [])
