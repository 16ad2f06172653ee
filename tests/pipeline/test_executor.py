"""The executor against plain autograd through all stages at once."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch
from executor_toy import (
    Ran,
    evaluate,
    expected,
    fail_on_stage,
    first_transfers,
    outlive_a_failed_stage,
    outputs_alive,
    run_against_the_flow,
    run_given,
    run_schedules,
    run_sizes,
    run_twice,
    run_unfit,
    transfers,
    wrong_count,
)

from megatron_ds.errors import ScheduleError
from megatron_ds.pipeline.action import Op
from megatron_ds.pipeline.placement import Placement, PlacementKind
from megatron_ds.pipeline.schedule import peak_in_flight
from megatron_ds.pipeline.schedules import activation_bound, build_schedule
from megatron_ds.pipeline.timeline import Timeline
from megatron_ds.testing import RankFailed, run_ranks

COUNTS = (1, 2, 5, 12)  # 12 micro-batches: more sends under way than the executor lets be


def check(ranks: list[Ran], num_stages: int, count: int, times: int = 1, last_rank: int | None = None) -> None:
    last_rank = (num_stages - 1) % len(ranks) if last_rank is None else last_rank
    loss, gradients = expected(num_stages, count, seed=0.25)
    seen = {}
    for rank, ran in enumerate(ranks):
        assert ran.loss == (pytest.approx(loss, abs=1e-12) if last_rank == rank else 0.0)
        seen |= ran.gradients
    assert seen.keys() == gradients.keys()
    for stage, tensors in gradients.items():
        for got, want in zip(seen[stage], tensors):
            torch.testing.assert_close(got, want * times, rtol=0, atol=1e-12, msg=f"stage {stage}")


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_both_schedules_equal_plain_autograd_and_each_other(pp: int) -> None:
    ranks = run_ranks(run_schedules, pp, pp, COUNTS)
    for count in COUNTS:
        gpipe, one = ([results[name, count] for results in ranks] for name in ("gpipe", "1f1b"))
        check(gpipe, pp, count)
        check(one, pp, count)
        for a, b in zip(gpipe, one):
            assert a.loss == b.loss
            for stage in a.gradients:  # summed in the same order: equal bit for bit
                assert all(torch.equal(x, y) for x, y in zip(a.gradients[stage], b.gradients[stage]))


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_the_recorded_timeline_is_the_schedule(name: str) -> None:
    pp, count = 3, 5
    ranks = [results[name, count] for results in run_ranks(run_schedules, pp, pp, (count,))]
    timeline = Timeline(tuple(event for ran in ranks for event in ran.recorded), "s")
    assert timeline.schedule().compute_only() == build_schedule(name, pp, count)
    assert timeline.num_ranks == pp and 0 <= timeline.bubble_fraction < 1
    bounds = activation_bound(name, build_schedule(name, pp, count))
    ends = {event.action: event.end for event in timeline.compute}
    starts = {event.action: event.start for event in timeline.compute}
    for rank, events in enumerate(timeline.by_rank):
        assert all(event.rank == rank and event.start <= event.end for event in events)
        assert all(before.end <= after.start for before, after in pairwise(events))
        assert peak_in_flight([event.action for event in events]) <= bounds[rank]
        for event in events:
            if event.action.op.is_receive:  # the ranks' clock is one: nothing is used before it was made
                assert event.end >= ends[event.action.producer]
                assert event.end <= starts[event.action.consumer]
    transfers = [event.action for event in timeline.events if not event.action.op.is_compute]
    assert len(transfers) == len(set(transfers)) == 4 * (pp - 1) * count
    assert {action.counterpart for action in transfers} == set(transfers)


@pytest.mark.parametrize("pp", [1, 3])
def test_the_last_backward_is_announced_once_right_before_it(pp: int) -> None:
    for name, count in (("gpipe", 4), ("1f1b", 4)):
        ranks = [results[name, count] for results in run_ranks(run_schedules, pp, pp, (count,))]
        for rank, ran in enumerate(ranks):
            ((stage, so_far),) = ran.announced
            assert stage == rank
            backwards = [index for index, event in enumerate(ran.recorded) if event.action.op is Op.B]
            assert backwards[-2] < so_far <= backwards[-1]


def test_a_second_run_is_like_the_first() -> None:
    check(run_ranks(run_twice, 2, 2), 2, 3, times=2)


@pytest.mark.parametrize("pp", [1, 2])
def test_steps_of_different_sizes_on_one_executor(pp: int) -> None:
    counts = (1, 3, 3, 6, 1)
    ranks = run_ranks(run_sizes, pp, pp, counts)
    for step, count in enumerate(counts):
        check([results[step] for results in ranks], pp, count)
        assert [results[step].announced for results in ranks] == [[(rank, 0)] for rank in range(pp)]


def test_several_stages_on_one_rank() -> None:
    one = [["0F0", "1F0", "0F1", "2F0", "2B0", "1F1", "2F1", "1B0", "2B1", "1B1", "0B0", "0B1"]]
    check([run_given(one, 3, 2)], 3, 2)
    # Two ranks of two chunks each: stage = chunk * 2 + rank.
    forwards = [[f"{chunk * 2 + rank}F{i}" for chunk in (0, 1) for i in range(3)] for rank in (0, 1)]
    backwards = [[f"{chunk * 2 + rank}B{i}" for chunk in (1, 0) for i in range(3)] for rank in (0, 1)]
    schedule = [f + b for f, b in zip(forwards, backwards)]
    check(run_ranks(run_given, 2, schedule, 4, 3), 4, 3)
    # The same on a V, where the last stage is on rank 0, with weight gradients apart.
    v = Placement.v(2)
    forwards = [[f"{stage}F{i}" for stage in v.stages_of(rank) for i in range(3)] for rank in (0, 1)]
    backwards = [[f"{s}{op}{i}" for s in v.stages_of(rank)[::-1] for i in range(3) for op in "BW"] for rank in (0, 1)]
    schedule = [f + b for f, b in zip(forwards, backwards)]
    check(run_ranks(run_given, 2, schedule, 4, 3, v), 4, 3, last_rank=0)


@pytest.mark.parametrize("placement", ["looped", "v"])
def test_between_two_ranks_each_group_carries_one_direction(placement: PlacementKind) -> None:
    """NCCL runs a group's transfers between two ranks in the order they were issued: with both ways in one group each
    rank would wait for what the other sends after its own receive."""
    schedule = build_schedule("gpipe", 2, 3, chunks=2, placement=placement)
    sent = [transfer for rank in run_ranks(transfers, 2, schedule, 4, 3) for transfer in rank]
    assert {(source, target) for _, source, target in sent} == {(0, 1), (1, 0)}
    directions: dict[str, set[tuple[int, int]]] = {}
    for group, source, target in sent:
        directions.setdefault(group, set()).add((source, target))
    assert len(directions) == 4 and all(len(ways) == 1 for ways in directions.values()), directions


@pytest.mark.parametrize("pp", [2, 3, 5])
@pytest.mark.parametrize("kind", ["one", "looped", "v"])
def test_pairs_meet_in_an_order_without_a_circle_and_none_is_left_out(kind: str, pp: int) -> None:
    """Every pair that a step's transfers connect, over the group that they use, where meeting blocks both."""
    chunks = 1 if kind == "one" else 2
    schedule = build_schedule("gpipe", pp, 2, chunks, "v" if kind == "v" else "looped")
    rank_of = schedule.placement.rank_of
    hops = [(rank_of(stage), rank_of(stage + 1)) for stage in range(schedule.num_stages - 1)]
    wanted = {("pp" if a < b else "against", a, b) for a, b in hops if a != b}
    wanted |= {("back" if a < b else "against back", b, a) for a, b in hops if a != b}
    found = first_transfers(schedule)
    assert len(found) == len(wanted) and set(found) == wanted


def test_an_output_that_is_sent_has_no_memory_any_more() -> None:
    """Until its backward pass only its graph is needed."""
    assert outputs_alive(3) == [0, 0, 0]


def test_an_executor_without_groups_against_the_flow_says_so() -> None:
    looped = build_schedule("gpipe", 2, 2, chunks=2)
    with pytest.raises(RankFailed, match=r"sends \w+ from rank . to rank .*against=mesh\.against_the_flow"):
        run_ranks(run_against_the_flow, 2, looped)


def test_stages_and_schedule_have_to_fit() -> None:
    two = build_schedule("gpipe", 1, 2, chunks=2)
    with pytest.raises(ScheduleError, match=r"rank 0 is given the stages \[0\], but the schedule places \[0, 1\]"):
        run_unfit(two, [0], [])
    with pytest.raises(ScheduleError, match=r"does not fit a pipeline of 1 ranks with stages on \[0, 0\]"):
        run_unfit(two, [0, 1], [build_schedule("gpipe", 1, 3, chunks=3)])


@pytest.mark.parametrize("pp", [1, 3])
@pytest.mark.parametrize("count", [1, 20])
def test_evaluation_is_forward_only(pp: int, count: int) -> None:
    loss, _ = expected(pp, count, seed=1.0)
    ranks = run_ranks(evaluate, pp, pp, count)
    assert [untouched for _, untouched in ranks] == [True] * pp
    assert [value for value, _ in ranks] == [0.0] * (pp - 1) + [pytest.approx(loss, abs=1e-12)]


def test_a_wrong_number_of_micro_batches_is_an_error_on_every_rank() -> None:
    messages = run_ranks(wrong_count, 2, 2)
    assert messages == ["2 micro-batches for a schedule of 3; build the schedule for the number of micro-batches"] * 2


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_failing_stage_is_named_and_ends_the_job(bad: int) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match=rf"rank {bad} of 3 failed first:[\s\S]*stage {bad} fails on micro-batch 2"):
        run_ranks(fail_on_stage, 3, 3, bad)
    assert time.monotonic() - start < 60


def test_ranks_that_wait_for_a_failed_stage_give_up_at_the_timeout() -> None:
    outcomes = run_ranks(outlive_a_failed_stage, 3, 3, 1, 2.0)
    assert outcomes[1][0] == "ValueError"
    for rank in (0, 2):
        outcome, seconds = outcomes[rank]
        assert outcome not in ("finished", "ValueError")
        assert seconds < 30
