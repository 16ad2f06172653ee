"""The validator: what it must refuse, by name and with the place marked, and an independent judge beside it."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_ds.errors import ScheduleError
from megatron_ds.pipeline.action import MAX_SENDS, Action, Op
from megatron_ds.pipeline.passes import add_communication, hoist_receives
from megatron_ds.pipeline.placement import Placement
from megatron_ds.pipeline.schedule import Schedule
from megatron_ds.pipeline.schedules import activation_bound, build_schedule
from megatron_ds.pipeline.validator import validate


def read(*ranks: str) -> Schedule:
    return Schedule.of([Action.parse(word) for word in rank.split()] for rank in ranks)


def refused(schedule: Schedule, m: int, *arguments: object, **keywords: object) -> tuple[str, list[str], set[str]]:
    """(message, lines of the drawing, marked actions) of the error."""
    with pytest.raises(ScheduleError) as caught:
        validate(replace(schedule, num_micro_batches=m), *arguments, **keywords)  # type: ignore[arg-type]
    message, *drawing = str(caught.value).splitlines()
    assert drawing[0].startswith("step")
    assert [line.split()[:2] for line in drawing[1:]] == [["rank", str(rank)] for rank in range(len(schedule))]
    assert all(len(line) <= 100 for line in drawing)
    return message, drawing, {word[1:] for line in drawing for word in line.split() if word.startswith("!")}


def one_f_one_b() -> Schedule:
    return add_communication(build_schedule("1f1b", 2, 4))


def edit(schedule: Schedule, rank: int, change: Callable[[list[str]], None]) -> Schedule:
    words = [str(action) for action in schedule[rank]]
    change(words)
    changed = [Action.parse(word) for word in words]
    return schedule.with_actions(actions if r != rank else changed for r, actions in enumerate(schedule))


def swap(words: list[str], one: str, other: str) -> None:
    i, j = words.index(one), words.index(other)
    words[i], words[j] = words[j], words[i]


def test_backward_before_its_forward() -> None:
    schedule = edit(build_schedule("1f1b", 2, 4), 1, lambda words: swap(words, "1F1", "1B1"))
    message, _, marked = refused(schedule, 4)
    assert message == "rank 1 runs 1B1 before 1F1, whose result it needs; swap them"
    assert marked == {"1B1", "1F1"}


def test_weight_gradient_before_its_backward_and_one_missing() -> None:
    validate(read("0F0 0B0 0W0 0F1 0B1 0W1"))
    message, _, _ = refused(read("0F0 0W0 0B0 0F1 0B1 0W1"), 2)
    assert "rank 0 runs 0W0 before 0B0" in message
    message, _, marked = refused(read("0F0 0B0 0W0 0F1 0B1"), 2)
    assert "0W1 is missing: stage 0 has to run F and B and W of all 2 micro-batches" in message
    assert marked == {"0B1"}


@pytest.mark.parametrize("action", ["0F3", "1B0", "1F2"])
def test_dropped_compute(action: str) -> None:
    schedule = edit(build_schedule("1f1b", 2, 4), int(action[0]), lambda words: words.remove(action))
    message, _, marked = refused(schedule, 4)
    assert f"{action} is missing: stage {action[0]} has to run F and B of all 4 micro-batches" in message
    assert f"add it to rank {action[0]}" in message
    assert len(marked) == 1 and next(iter(marked))[-1] == action[-1]  # its forward or backward, which is there


def test_a_whole_stage_missing() -> None:
    assert "1F0 is missing" in refused(Schedule.of([build_schedule("1f1b", 2, 2)[0], []]), 2)[0]


@pytest.mark.parametrize("action", ["0F3", "1B0", "0SF1", "1RF2"])
def test_duplicated(action: str) -> None:
    schedule = edit(one_f_one_b(), int(action[0]), lambda words: words.append(action))
    message, drawing, marked = refused(schedule, 4)
    first = [str(a) for a in schedule[int(action[0])]].index(action)
    assert (
        f"rank {action[0]} runs {action} twice, as its actions {first} and {len(schedule[int(action[0])]) - 1}"
        in message
    )
    assert marked == {action}
    assert sum("!" in line for line in drawing) == 1


def test_micro_batch_out_of_range() -> None:
    message, _, marked = refused(build_schedule("1f1b", 2, 5), 4)
    assert "rank 0 runs 0F4, but there are 4 micro-batches" in message and marked == {"0F4"}


def test_stage_on_the_wrong_rank() -> None:
    ranks = build_schedule("1f1b", 2, 2)
    message, _, marked = refused(ranks.with_actions([ranks[1], ranks[0]]), 2)
    assert "rank 0 runs 1F0, but stage 1 lives on rank 1" in message and marked == {"1F0"}
    refused(ranks.with_actions(reversed(add_communication(ranks).actions)), 2)


@pytest.mark.parametrize("action", ["0SF1", "1RF1", "1SB2", "0RB2"])
def test_dropped_transfer(action: str) -> None:
    schedule = edit(one_f_one_b(), int(action[0]), lambda words: words.remove(action))
    message, _, marked = refused(schedule, 4)
    other = Action.parse(action).counterpart
    assert f"{action} is missing on rank {action[0]}" in message and f"its other end is {other}" in message
    assert str(other) in marked


def test_transfer_that_leads_nowhere() -> None:
    message, _, marked = refused(edit(one_f_one_b(), 0, lambda words: words.insert(0, "0RF0")), 4)
    assert "rank 0 has 0RF0, but no data crosses there: stages are 0 to 1 over 2 ranks; drop it" in message
    assert marked == {"0RF0"}
    assert "1SF3" in refused(edit(one_f_one_b(), 1, lambda words: words.append("1SF3")), 4)[0]


def test_send_before_its_compute_and_receive_after_its_use() -> None:
    message, _, _ = refused(edit(one_f_one_b(), 0, lambda words: swap(words, "0F1", "0SF1")), 4)
    assert "rank 0 has 0SF1 before 0F1, whose result it sends" in message
    message, _, _ = refused(edit(one_f_one_b(), 1, lambda words: swap(words, "1RF1", "1F1")), 4)
    assert "rank 1 has 1RF1 after 1F1, which needs what it receives" in message


def test_ends_of_a_link_in_different_order() -> None:
    """Each rank is right by itself, and every send has its receive: a run would train on swapped micro-batches."""
    schedule = add_communication(read("0F0 0F1 0F2 0B0 0B1 0B2", "1F0 1F2 1F1 1B0 1B1 1B2"))
    message, _, marked = refused(schedule, 3)
    assert "activation 1 from rank 0 to rank 1 is sent as 0SF1 and received as 1RF2 (which is 0SF2)" in message
    assert marked == {"0SF1", "1RF2"}
    schedule = add_communication(read("0F0 0F1 0B0 0B1", "1F0 1F1 1B1 1B0"))
    assert "gradient 0 from rank 1 to rank 0 is sent as 1SB1 and received as 0RB0" in refused(schedule, 2)[0]


@pytest.mark.parametrize("transfers", [False, True])
def test_deadlock_names_the_circle_and_not_the_bystander(transfers: bool) -> None:
    schedule = read("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1", "2F0 2F1 2B0 2B1")
    message, drawing, marked = refused(add_communication(schedule) if transfers else schedule, 2)
    assert message.startswith(
        "deadlock: rank 0 stands before 0B0, which needs 1B0 of rank 1; rank 1 stands before 1F1, which needs 0F1 of "
        "rank 0; no rank of this circle can go first"
    )
    assert marked == {"0B0", "1F1"}
    assert [line.split() for line in drawing[1:]] == [
        ["rank", "0", "0F0", ".", ".", "!0B0", "0F1", "0B1"],
        ["rank", "1", ".", "1F0", ".", "!1F1", "1B0", "1B1"],
        ["rank", "2", ".", ".", "2F0", "2F1", "2B0", "2B1"],
    ]


def test_deadlock_leaves_out_who_merely_waits_for_the_circle() -> None:
    message, _, marked = refused(read("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1", "2F0 2F1 2B0 2B1"), 2)
    assert message.startswith("deadlock: rank 1 stands before 1B0, which needs 2B0 of rank 2; rank 2 stands before 2F1")
    assert marked == {"1B0", "2F1"}


def test_hoisted_receives_may_not_block() -> None:
    hoisted = hoist_receives(one_f_one_b())
    validate(hoisted)
    assert "deadlock" in refused(hoisted, 4, blocking_receives=True)[0]


def test_bound_exceeded() -> None:
    message, _, marked = refused(build_schedule("gpipe", 2, 4), 4, [2, 1])
    assert message == (
        "rank 0 holds the activations of 3 micro-batches after 0F2, over its bound of 2; run a backward before it, "
        "or raise the bound if the memory is there"
    )
    assert marked == {"0F2"}
    assert "rank 1 holds the activations of 1 " in refused(build_schedule("1f1b", 2, 4), 4, [2, 0])[0]
    with pytest.raises(ScheduleError, match="max_in_flight has 1 bounds for the 2 ranks"):
        validate(build_schedule("1f1b", 2, 4), [2])


def test_no_rank_at_all() -> None:
    with pytest.raises(ScheduleError, match="no rank"):
        Schedule.of([])


def test_placement_and_schedule_have_to_fit() -> None:
    two = build_schedule("1f1b", 2, 2)
    with pytest.raises(ScheduleError, match="placement is of 3 ranks and the schedule of 2"):
        validate(replace(two, placement=Placement.looped(3)))
    with pytest.raises(ScheduleError, match="placement is of 3 ranks and the schedule of 2"):
        Schedule.of(two.actions, Placement.looped(3))
    with pytest.raises(ScheduleError, match=r"placement \[0, 1, 1\] puts \[1, 2\] stages on the 2 ranks"):
        validate(replace(two, placement=Placement(2, (0, 1, 1))))
    with pytest.raises(ScheduleError, match="rank 0 runs 4F0, but the placement has 2 stages"):
        validate(two.with_actions([[Action(4, Op.F, 0)], two[1]]))


@pytest.mark.parametrize("v", [False, True])
def test_two_chunks_of_gpipe(v: bool) -> None:
    schedule = add_communication(build_schedule("gpipe", 3, 4, chunks=2, placement="v" if v else "looped"))
    validate(schedule, activation_bound("gpipe", schedule), blocking_receives=True)
    validate(hoist_receives(schedule))
    assert schedule.placement.ranks == ((0, 1, 2, 2, 1, 0) if v else (0, 1, 2, 0, 1, 2))
    crossing = 4 if v else 5  # of the five hand-overs between stages; the turning point of the V stays on its rank
    assert sum(action.op is Op.SEND_F for actions in schedule for action in actions) == crossing * 4


@pytest.mark.parametrize("surplus", [0, 1])
def test_more_sends_than_may_be_under_way(surplus: int) -> None:
    """On a V, rank 2 takes one activation and then waits for a gradient that rank 1 makes after its last forward."""
    each = range(MAX_SENDS // 2 + surplus)
    rank_0 = [*(f"0F{i}" for i in each), *(f"5{op}{i}" for i in each for op in "FB"), *(f"0B{i}" for i in each)]
    rank_1 = [*(f"1F{i}" for i in each), *(f"4{op}{i}" for i in each for op in "FB"), *(f"1B{i}" for i in each)]
    rank_2 = [f"{action}{i}" for i in each for action in ("2F", "3F", "3B", "2B")]
    actions = [[Action.parse(word) for word in rank] for rank in (rank_0, rank_1, rank_2)]
    schedule = add_communication(Schedule.of(actions, Placement.v(3)))
    if not surplus:
        validate(schedule)
        return
    message, _, _ = refused(schedule, len(each))
    assert message.startswith(
        f"deadlock: rank 1 stands before 4SB{each[-2]}, which needs 2RF{each[-1]} of rank 2; rank 2 stands before "
        f"3B{each[-2]}, which needs 4B{each[-2]} of rank 1"
    )


def test_two_chunks_a_rank() -> None:
    """Stage 2 is rank 0's second chunk: the grammar and the checks hold although no schedule makes this yet."""
    schedule = add_communication(read("0F0 2F0 2B0 0B0", "1F0 3F0 3B0 1B0"))
    validate(schedule, [2, 2], blocking_receives=True)
    assert "deadlock" in refused(read("2F0 0F0 2B0 0B0", "1F0 3F0 3B0 1B0"), 1)[0]


def judge(schedule: Schedule, m: int, blocking: bool) -> bool:
    """Play the lists over first-in-first-out channels, the slow obvious way; True if all ends well."""
    pp = len(schedule)
    last = pp - 1
    sent: dict[tuple[int, int, str], deque[int]] = {}
    posted: dict[tuple[int, int, str], deque[int]] = {}
    here: list[set[str]] = [set() for _ in schedule]  # per rank: finished actions, and data received
    place = [0] * pp
    moved = True
    while moved:
        moved = False
        for rank in range(pp):
            if place[rank] == len(schedule[rank]):
                continue
            action = schedule[rank][place[rank]]
            mb, name = action.micro_batch, str(action)
            if action.stage != rank or not 0 <= mb < m or name in here[rank]:
                return False
            go = True
            match action.op:
                case Op.F:
                    go = rank == 0 or f"got F{mb}" in here[rank]
                case Op.B:
                    go = f"{rank}F{mb}" in here[rank] and (rank == last or f"got B{mb}" in here[rank])
                case Op.SEND_F | Op.SEND_B:
                    step = 1 if action.op is Op.SEND_F else -1
                    kind = "F" if step == 1 else "B"
                    if not 0 <= rank + step <= last or f"{rank}{kind}{mb}" not in here[rank]:
                        return False
                    sent.setdefault((rank, rank + step, kind), deque()).append(mb)
                case Op.RECV_F | Op.RECV_B:
                    step = -1 if action.op is Op.RECV_F else 1
                    kind = "F" if step == -1 else "B"
                    if not 0 <= rank + step <= last:
                        return False
                    link = (rank + step, rank, kind)
                    if blocking:
                        go = bool(sent.get(link))
                        if go and sent[link].popleft() != mb:
                            return False
                        if go:
                            here[rank].add(f"got {kind}{mb}")
                    else:
                        posted.setdefault(link, deque()).append(mb)
            if go:
                moved = True
                here[rank].add(name)
                place[rank] += 1
            for link in posted:
                while posted[link] and sent.get(link):
                    mb = sent[link].popleft()
                    if posted[link].popleft() != mb:
                        return False
                    here[link[1]].add(f"got {link[2]}{mb}")
                    moved = True
    complete = all({f"{r}{op}{mb}" for op in "FB" for mb in range(m)} <= here[r] for r in range(pp))
    empty = not any(sent.values()) and not any(posted.values())
    return all(place[r] == len(schedule[r]) for r in range(pp)) and complete and empty


@pytest.mark.parametrize("blocking", [False, True])
def test_agrees_with_an_independent_judge_on_damaged_schedules(blocking: bool) -> None:
    """A few random moves, drops and copies in a good schedule: the verdicts agree every time, and both occur."""
    rng = random.Random(7)
    verdicts: Counter[bool] = Counter()
    reasons: Counter[str] = Counter()
    for _ in range(1500):
        pp, m = rng.randint(2, 4), rng.randint(1, 4)
        schedule = build_schedule(rng.choice(["gpipe", "1f1b"]), pp, m)
        if rng.random() < 0.5:  # another compute order with the transfers that belong to it
            ranks = [list(actions) for actions in schedule]
            for actions in ranks:
                for _ in range(rng.choice([0, 0, 1, 2])):
                    i = rng.randrange(len(actions) - 1)
                    actions[i], actions[i + 1] = actions[i + 1], actions[i]
            schedule = add_communication(schedule.with_actions(ranks))
        else:
            ranks = [list(actions) for actions in hoist_receives(add_communication(schedule), rng.choice([0, 1]))]
            for _ in range(rng.choice([0, 1, 2])):
                actions = rng.choice(ranks)
                i = rng.randrange(len(actions) - 1)
                kind = rng.random()
                if kind < 0.8:
                    actions[i], actions[i + 1] = actions[i + 1], actions[i]
                elif kind < 0.9:
                    del actions[i]
                else:
                    actions.insert(rng.randrange(len(actions)), actions[i])
            schedule = schedule.with_actions(ranks)
        expected = judge(schedule, m, blocking)
        try:
            validate(schedule, blocking_receives=blocking)
            verdict, reason = True, "valid"
        except ScheduleError as error:
            verdict, reason = False, str(error).splitlines()[0]
        assert verdict == expected, (reason, [" ".join(map(str, actions)) for actions in schedule])
        verdicts[verdict] += 1
        reasons["deadlock" if reason.startswith("deadlock") else "other"] += 1
    assert min(verdicts.values()) > 200
    assert reasons["deadlock"] > 15
