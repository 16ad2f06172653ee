"""The spelling of actions, and what a transfer's two ends say of each other."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.errors import ConfigError, ScheduleError
from megatron_ds.pipeline.action import Action, Op
from megatron_ds.pipeline.placement import Placement
from megatron_ds.pipeline.schedule import Schedule, in_flight, peak_in_flight

actions = st.builds(Action, st.integers(0, 999), st.sampled_from(Op), st.integers(0, 9999))
parse = Action.parse


@settings(derandomize=True, deadline=None)
@given(actions)
def test_parse_reads_what_str_writes(action: Action) -> None:
    assert parse(str(action)) == action
    assert hash(parse(str(action))) == hash(action)


def test_spelling() -> None:
    spelled = {
        "0F3": Action(0, Op.F, 3),
        "1B0": Action(1, Op.B, 0),
        "1W0": Action(1, Op.W, 0),
        "0SF3": Action(0, Op.SEND_F, 3),
        "1RF3": Action(1, Op.RECV_F, 3),
        "12SB34": Action(12, Op.SEND_B, 34),
        "0RB3": Action(0, Op.RECV_B, 3),
    }
    assert {str(action): action for action in spelled.values()} == spelled


@pytest.mark.parametrize("text", ["", "F3", "0F", "0X1", "-1F0", "0f3", " 0F3", "0F3\n", "0FB1", "0F٣"])
def test_no_action(text: str) -> None:
    with pytest.raises(ScheduleError, match=r"is not an action: write <stage><op><micro batch>.*0F3"):
        parse(text)


def test_order_is_stage_then_op_then_micro_batch() -> None:
    ordered = [parse(text) for text in ("0B1", "0F0", "0F2", "0F10", "1B0")]
    assert sorted({*ordered}) == ordered


def test_ends_of_a_transfer() -> None:
    for send, receive, producer, consumer in (
        ("0SF3", "1RF3", "0F3", "1F3"),
        ("1SB3", "0RB3", "1B3", "0B3"),
    ):
        assert parse(send).counterpart == parse(receive)
        assert parse(receive).counterpart == parse(send)
        for end in (send, receive):
            assert parse(end).producer == parse(producer)
            assert parse(end).consumer == parse(consumer)


def test_placements_by_hand() -> None:
    assert Placement.looped(3, 2).ranks == (0, 1, 2, 0, 1, 2)
    assert Placement.v(3).ranks == (0, 1, 2, 2, 1, 0)
    assert Placement.v(2, 3).ranks == (0, 1, 1, 0, 0, 1)
    assert Placement.v(3).stages_of(1) == [1, 4] and Placement.v(3).chunks == 2
    assert [Placement.v(2).crosses(stage) for stage in range(3)] == [True, False, True]
    with pytest.raises(ConfigError, match="chunks=0 is no pipeline"):
        Placement.of("v", 2, 0)
    assert Schedule.of([[parse("0F0")], [], []]).num_stages == 3
    assert Schedule.of([[parse("3F0")], [], []]).num_stages == 6


def test_in_flight_counts_until_the_last_use_of_the_activation() -> None:
    def counts(text: str) -> list[int]:
        return in_flight(parse(word) for word in text.split())

    assert counts("0F0 0SF0 0F1 0B0 0B1") == [1, 1, 2, 1, 0]
    assert counts("0F0 0B0 0F1 0W0 0B1 0W1") == [1, 1, 2, 1, 1, 0]  # the weight gradient still needs the input
    assert peak_in_flight([]) == 0


def test_no_torch_behind_the_pure_part() -> None:
    """Planner and drawing work where torch is absent, and start without its import time."""
    names = [
        "action",
        "placement",
        "schedule",
        "passes",
        "schedules",
        "simulate",
        "timeline",
        "validator",
        "draw",
        "layer_split",
    ]
    code = f"import sys; {'; '.join(f'import megatron_ds.pipeline.{n}' for n in names)}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
