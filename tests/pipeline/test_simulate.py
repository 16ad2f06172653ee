"""The simulator against closed forms and against times relaxed to a fixed point; recorded runs read back."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.errors import DataError, ScheduleError
from megatron_ds.pipeline.action import Action, Op
from megatron_ds.pipeline.passes import add_communication, hoist_receives
from megatron_ds.pipeline.schedule import Schedule
from megatron_ds.pipeline.schedules import SCHEDULES, activation_bound, build_schedule
from megatron_ds.pipeline.simulate import Cost, Costs, simulate
from megatron_ds.pipeline.timeline import Timeline

names = st.sampled_from(sorted(SCHEDULES))
costs = st.integers(0, 40).map(lambda tenths: tenths / 8)  # multiples of 1/8: sums are exact


@settings(derandomize=True, deadline=None, max_examples=100)
@given(names, st.integers(1, 9), st.integers(1, 20), st.integers(1, 8), st.integers(1, 8))
def test_bubble_of_equal_stages(name: str, pp: int, m: int, forward: int, backward: int) -> None:
    timeline = simulate(build_schedule(name, pp, m), Costs(forward, backward))
    assert timeline.makespan == (m + pp - 1) * (forward + backward)
    assert timeline.bubble_fraction == pytest.approx((pp - 1) / (m + pp - 1), abs=1e-12)
    assert [timeline.peak_in_flight(rank) for rank in range(pp)] == activation_bound(name, build_schedule(name, pp, m))
    assert timeline.schedule() == build_schedule(name, pp, m)


def relaxed(schedule: Schedule, cost: Cost) -> dict[Action, tuple[float, float]]:
    """(start, end) of every compute action: start all at 0 and push each to its constraints until none moves."""
    pp = len(schedule)
    issue: dict[Action, float] = {}
    arrival: dict[Action, float] = {}  # by receive
    span: dict[Action, tuple[float, float]] = {}
    moved = True
    while moved:
        moved = False
        for actions in schedule:
            clock = 0.0
            for action in actions:
                if action.op.is_compute:
                    s, m = action.stage, action.micro_batch
                    needs = [Action(s, Op.RECV_F if action.op is Op.F else Op.RECV_B, m)]
                    start = max([clock, *(arrival.get(need, 0.0) for need in needs)])
                    clock = start + cost(action)
                    if span.get(action) != (start, clock):
                        span[action], moved = (start, clock), True
                else:
                    issue[action] = clock
        for rank in range(pp):
            for op in (Op.SEND_F, Op.SEND_B):
                free = 0.0
                for send in (action for action in schedule[rank] if action.op is op):
                    both = max(free, issue[send], issue[send.counterpart])
                    free = both + cost(send)
                    if arrival.get(send.counterpart) != free:
                        arrival[send.counterpart], moved = free, True
    return span


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data(), names, st.integers(1, 5), st.integers(1, 7), st.sampled_from([None, 0, 1, 2]))
def test_times_are_the_fixed_point(data: st.DataObject, name: str, pp: int, m: int, ahead: int | None) -> None:
    per_stage = st.lists(costs, min_size=pp, max_size=pp)
    cost = Costs(data.draw(per_stage), data.draw(per_stage), send=data.draw(per_stage))
    schedule = add_communication(build_schedule(name, pp, m))
    # Without transfers in the schedule, every receive counts as posted from the start.
    explicit = hoist_receives(schedule, 4 * m if ahead is None else ahead)
    timeline = simulate(build_schedule(name, pp, m) if ahead is None else explicit, cost)
    assert {e.action: (e.start, e.end) for e in timeline.compute} == relaxed(explicit, cost)
    for events in timeline.by_rank:
        assert [e.start for e in events] == sorted(e.start for e in events)
        busy = [e for e in events if e.action.op.is_compute]
        assert all(before.end <= after.start for before, after in itertools.pairwise(busy))


@settings(derandomize=True, deadline=None, max_examples=40)
@given(names, st.integers(2, 6), st.integers(1, 10), costs)
def test_posting_receives_early_never_costs_time(name: str, pp: int, m: int, send: float) -> None:
    compute = build_schedule(name, pp, m)
    late = add_communication(compute)
    spans = [simulate(s, Costs(send=send)).makespan for s in (compute, hoist_receives(late), late)]
    assert spans == sorted(spans)
    if send == 0:
        assert spans[0] == spans[2]


def test_transfer_hidden_behind_compute_or_not() -> None:
    """GPipe on two ranks: posted late, each transfer is waited for; posted one ahead, it runs beside a forward."""
    late = add_communication(build_schedule("gpipe", 2, 4))
    cost = Costs(forward=1.0, backward=1.0, send=1.0)
    # Fill, 4 x (transfer, forward), 1 + 4 x (transfer, backward) of the last stage and then the first.
    assert simulate(late, cost).makespan == 1 + 4 * 2 + 1 + 4 * 2
    early = simulate(hoist_receives(late), cost)
    assert early.makespan == (1 + 1) + 4 + 4 + (1 + 1)  # one transfer each way is all that shows
    waits = {str(e.action): e.end - e.start for e in simulate(late, cost).by_rank[1] if e.action.op.is_receive}
    assert waits == {"1RF0": 2.0, "1RF1": 1.0, "1RF2": 1.0, "1RF3": 1.0}
    sends = {str(e.action): (e.start, e.end) for e in early.by_rank[0] if e.action.op.is_send}
    assert sends == {"0SF0": (1, 2), "0SF1": (2, 3), "0SF2": (3, 4), "0SF3": (4, 5)}


def test_slowest_stage_sets_the_pace() -> None:
    m = 64
    timeline = simulate(build_schedule("1f1b", 4, m), Costs([1, 1, 3, 1], [2, 2, 6, 2]))
    assert m * 9 < timeline.makespan <= m * 9 + 3 * 3
    assert timeline.bubble_fraction > 0.5


def test_weight_gradient_fills_time_and_holds_activations() -> None:
    schedule = Schedule.of([[Action.parse(word) for word in ["0F0", "0B0", "0F1", "0B1", "0W0", "0W1"]]])
    timeline = simulate(schedule, Costs(1, 1, 0.5))
    assert timeline.makespan == 5 and timeline.peak_in_flight(0) == 2


def test_cost_may_be_any_function() -> None:
    timeline = simulate(
        build_schedule("1f1b", 2, 3), lambda action: 1.0 if action.op is not Op.B else 2.0 + action.stage
    )
    assert timeline.makespan == simulate(build_schedule("1f1b", 2, 3), Costs(1, [2, 3], send=1)).makespan


def test_too_few_costs_and_deadlock_are_refused() -> None:
    with pytest.raises(ScheduleError, match="backward costs are given for 2 stages, and 2B0 runs on stage 2"):
        simulate(build_schedule("1f1b", 3, 2), Costs(backward=[1, 2]))
    stuck = Schedule.of([Action.parse(w) for w in rank.split()] for rank in ("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"))
    with pytest.raises(ScheduleError, match="cannot finish: rank 0 stands before 0B0, which needs 1B0 of rank 1; "):
        simulate(stuck)
    for pp in (1, 2):
        schedule = build_schedule("gpipe", pp, 1)
        backwards = schedule.with_actions(reversed(actions) for actions in schedule)
        with pytest.raises(ScheduleError, match=f"rank {pp - 1} stands before {pp - 1}B0, which needs {pp - 1}F0"):
            simulate(backwards)


def test_the_work_grows_with_the_actions_alone() -> None:
    """Calls are counted, not seconds: those of a busy machine, or of a heap that others filled, say nothing."""

    def calls(chunks: int) -> int:
        schedule, count = build_schedule("1f1b", 16, chunks), 0

        def one_more(_frame: object, event: str, _argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(one_more)
        try:
            timeline = simulate(schedule)
        finally:
            sys.setprofile(None)
        assert timeline.bubble_fraction == pytest.approx(15 / (chunks + 15))
        return count

    few, many = calls(32), calls(256)
    assert many < 8.5 * few
    assert many < 200 * 16 * 256 * 2  # a forward and a backward of each micro-batch on each stage


def test_recorded_run_reads_back(tmp_path: Path) -> None:
    timeline = simulate(hoist_receives(add_communication(build_schedule("1f1b", 3, 5))), Costs(send=0.3))
    for rank in range(3):
        timeline.to_json_file(tmp_path / f"rank{rank}.json", rank)
    timeline.to_json_file(tmp_path / "all.json")
    one_each = Timeline.from_json_files(sorted(tmp_path.glob("rank*.json")))
    assert one_each.events == Timeline.from_json_files([tmp_path / "all.json"]).events == timeline.events
    assert one_each.unit == "s"
    assert one_each.bubble_fraction == timeline.bubble_fraction and one_each.schedule() == timeline.schedule()


def test_recorded_clock_starts_anywhere(tmp_path: Path) -> None:
    rows = [
        {"rank": 1, "action": "1F0", "start": 1001.0, "end": 1002.0},
        {"rank": 0, "action": "0B0", "start": 1004.0, "end": 1006.0},
        {"rank": 0, "action": "0F0", "start": 1000.0, "end": 1001.0},
        {"rank": 1, "action": "1B0", "start": 1002.0, "end": 1004.0},
    ]
    (tmp_path / "run.json").write_text(json.dumps(rows))
    timeline = Timeline.from_json_files([tmp_path / "run.json"])
    assert [(e.rank, str(e.action), e.start) for e in timeline.events] == [
        (0, "0F0", 0.0), (0, "0B0", 4.0), (1, "1F0", 1.0), (1, "1B0", 2.0),
    ]  # fmt: skip
    assert timeline.makespan == 6.0 and timeline.bubble_fraction == 0.5


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "not a recorded pipeline run"),
        ('{"rank": 0}', "not a recorded pipeline run"),
        ('[{"rank": 0, "action": "0F0", "start": 0.0}]', "KeyError: 'end'"),
        ('[{"rank": 0, "action": "forward", "start": 0.0, "end": 1.0}]', "'forward' is not an action"),
        ('[{"rank": 0, "action": "0F0", "start": 2.0, "end": 1.0}]', "0F0 of rank 0 runs from 2.0 to 1.0"),
        ('[{"rank": 0, "action": "0F0", "start": NaN, "end": 1.0}]', "runs from nan"),
        ('[{"rank": -1, "action": "0F0", "start": 0.0, "end": 1.0}]', "of rank -1"),
        ('[{"rank": 2, "action": "2F0", "start": 0.0, "end": 1.0}]', "no events of rank 0; give the files"),
        ("[]", "no pipeline event; record at least one step"),
    ],
)
def test_bad_recording(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(DataError, match=complaint):
        Timeline.from_json_files([tmp_path / "run.json"])


def test_missing_recording(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.json is not a recorded pipeline run \(FileNotFoundError"):
        Timeline.from_json_files([tmp_path / "gone.json"])
