"""The generated schedules, against pictures drawn by hand and closed forms."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.errors import ConfigError, ScheduleError
from megatron_ds.pipeline.passes import add_communication, hoist_receives
from megatron_ds.pipeline.schedule import Schedule, in_flight, peak_in_flight
from megatron_ds.pipeline.schedules import SCHEDULES, activation_bound, build_schedule
from megatron_ds.pipeline.validator import validate

names = st.sampled_from(sorted(SCHEDULES))
pps = st.integers(1, 9)
micro_batches = st.integers(1, 20)


def spelled(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, actions)) for actions in schedule]


def test_1f1b_by_hand() -> None:
    assert spelled(build_schedule("1f1b", 3, 4)) == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]
    assert spelled(build_schedule("1f1b", 1, 3)) == ["0F0 0B0 0F1 0B1 0F2 0B2"]
    assert spelled(build_schedule("1f1b", 4, 1)) == ["0F0 0B0", "1F0 1B0", "2F0 2B0", "3F0 3B0"]


def test_gpipe_by_hand() -> None:
    assert spelled(build_schedule("gpipe", 2, 3)) == ["0F0 0F1 0F2 0B0 0B1 0B2", "1F0 1F1 1F2 1B0 1B1 1B2"]


def test_communication_by_hand() -> None:
    assert spelled(add_communication(build_schedule("1f1b", 3, 1))) == [
        "0F0 0SF0 0RB0 0B0",
        "1RF0 1F0 1SF0 1RB0 1B0 1SB0",
        "2RF0 2F0 2B0 2SB0",
    ]
    assert spelled(hoist_receives(add_communication(build_schedule("1f1b", 2, 2)))) == [
        "0F0 0SF0 0RB0 0F1 0SF1 0RB1 0B0 0B1",
        "1RF0 1F0 1RF1 1B0 1SB0 1F1 1RB1 1B1 1SB1".replace(" 1RB1", ""),
    ]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(names, pps, micro_batches)
def test_every_schedule_is_valid_and_reaches_its_bound(name: str, pp: int, m: int) -> None:
    schedule = build_schedule(name, pp, m)
    bound = activation_bound(name, schedule)
    with_transfers = add_communication(schedule)
    validate(schedule, bound)
    validate(hoist_receives(with_transfers), bound)
    validate(hoist_receives(with_transfers, 3), bound)
    validate(with_transfers, bound, blocking_receives=True)
    # The bound is tight, neither promise nor schedule has slack.
    assert [peak_in_flight(actions) for actions in schedule] == bound
    assert all(in_flight(actions)[-1] == 0 for actions in schedule)
    assert bound == [{"gpipe": m, "1f1b": min(m, pp - rank)}[name] for rank in range(pp)]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(names, pps, micro_batches)
def test_gradients_accumulate_in_one_order_under_every_schedule(name: str, pp: int, m: int) -> None:
    for actions in build_schedule(name, pp, m):
        assert [action.micro_batch for action in actions if action.op == "B"] == list(range(m))


@settings(derandomize=True, deadline=None, max_examples=80)
@given(names, pps, micro_batches, st.integers(0, 4), st.integers(0, 4))
def test_hoisting_moves_receives_only_and_adds_up(name: str, pp: int, m: int, first: int, second: int) -> None:
    schedule = add_communication(build_schedule(name, pp, m))
    hoisted = hoist_receives(schedule, first)
    assert hoist_receives(hoisted, second) == hoist_receives(schedule, first + second)
    assert hoist_receives(schedule, 0) == schedule
    for before, after in zip(schedule, hoisted):
        assert [a for a in before if not a.op.is_receive] == [a for a in after if not a.op.is_receive]
        assert [a for a in before if a.op.is_receive] == [a for a in after if a.op.is_receive]
        # Buffers: never more than `first` received ahead of the one in use.
        waiting = 0
        for action in after:
            waiting += action.op.is_receive
            assert waiting <= first + 1
            if action.op.is_compute and any(r.op.is_receive and r.consumer == action for r in after):
                waiting -= 1
        # Each receive has exactly `first` more compute actions before its use, unless the list starts there.
        position = {action: index for index, action in enumerate(after)}
        for action in after:
            if action.op.is_receive:
                between = sum(a.op.is_compute for a in after[position[action] : position[action.consumer]])
                computes = [a for a in before if a.op.is_compute]
                assert between == min(first, computes.index(action.consumer))


def test_stages_of_one_rank_hand_over_without_a_transfer() -> None:
    one_rank = Schedule.of([[action for actions in build_schedule("gpipe", 2, 2) for action in actions]])
    assert add_communication(one_rank) == one_rank


def test_communication_is_added_once() -> None:
    schedule = add_communication(build_schedule("1f1b", 2, 2))
    assert schedule.compute_only() == build_schedule("1f1b", 2, 2)
    with pytest.raises(ScheduleError, match="already has transfers"):
        add_communication(schedule)
    with pytest.raises(ScheduleError, match="ahead=-1 would post receives after their use"):
        hoist_receives(schedule, -1)


def test_registry_is_read_only() -> None:
    with pytest.raises(TypeError):
        SCHEDULES["mine"] = SCHEDULES["gpipe"]  # type: ignore[index]


def test_errors_name_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"unknown pipeline schedule '1f1p'; did you mean '1f1b'\?.*gpipe, 1f1b"):
        build_schedule("1f1p", 2, 4)
    with pytest.raises(ConfigError, match=r"unknown pipeline schedule 'zzzz' \(known"):
        activation_bound("zzzz", build_schedule("1f1b", 2, 4))
    with pytest.raises(ConfigError, match=r"num_micro_batches=0.*at least 1"):
        build_schedule("1f1b", 2, 0)
    with pytest.raises(ConfigError, match=r"pp=0.*at least 1"):
        build_schedule("1f1b", 0, 4)
    with pytest.raises(ConfigError, match="'1f1b' runs one model chunk a rank, not chunks=2"):
        build_schedule("1f1b", 2, 4, chunks=2)
