"""The drawings say what the schedule says, within the width they were given; the command line runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.pipeline.draw import draw_png, draw_steps, draw_text
from megatron_ds.pipeline.passes import add_communication
from megatron_ds.pipeline.schedule import Schedule
from megatron_ds.pipeline.schedules import SCHEDULES, build_schedule
from megatron_ds.pipeline.simulate import Costs, simulate
from megatron_ds.pipeline.timeline import Timeline

TOOL = Path(__file__).parents[2] / "tools" / "show_schedule.py"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def test_steps_by_hand() -> None:
    picture = """\
step      0   1   2   3   4   5
rank 0  0F0 0F1   . 0B0   . 0B1
rank 1    . 1F0 1B0 1F1 1B1   ."""
    schedule = build_schedule("1f1b", 2, 2)
    assert draw_text(schedule) == picture
    assert draw_text(add_communication(schedule)) == picture  # transfers take no step of their own
    assert draw_steps(schedule, [(1, 1)]).splitlines()[2] == "rank 1     .  1F0 !1B0  1F1  1B1    ."


def test_to_scale_by_hand() -> None:
    timeline = simulate(build_schedule("1f1b", 2, 2), Costs(1, 2))
    assert (
        draw_text(timeline, width=7 + 9 * 3)
        == """\
rank 0 0>>1>>......0<<<<<...1<<<<<
rank 1 ...0>>0<<<<<1>>1<<<<<......
       0                         9
       > forward   < backward   . idle"""
    )


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 12), st.integers(1, 120), st.integers(40, 140), st.booleans())
def test_fits_and_colour_changes_no_character(name: str, pp: int, m: int, width: int, to_scale: bool) -> None:
    schedule = build_schedule(name, pp, m)
    what: Timeline | Schedule = simulate(schedule) if to_scale else schedule
    plain = draw_text(what, width)
    assert all(len(line) <= width for line in plain.splitlines())
    assert sum(line.startswith("rank ") for line in plain.splitlines()) == pp
    coloured = draw_text(what, width, color=True)
    assert ANSI.sub("", coloured) == plain and coloured != plain
    assert all(line.count("\x1b[0m") * 2 == line.count("\x1b") for line in coloured.splitlines())


def test_a_long_schedule_shows_the_marked_place() -> None:
    schedule = build_schedule("1f1b", 4, 500)
    index = [str(action) for action in schedule[2]].index("2B250")
    picture = draw_steps(schedule, [(2, index)])
    assert "!2B250" in picture.splitlines()[3]
    assert picture.count("!") == 1 and picture.splitlines()[0].count("...") == 2
    ends = draw_text(schedule).splitlines()
    assert "0F0" in ends[1] and ends[1].endswith("0B499") and ends[0].count("...") == 1


def test_share_of_busy_columns_is_the_busy_share() -> None:
    timeline = simulate(build_schedule("gpipe", 4, 8), Costs([1, 2, 1, 1], [2, 4, 2, 2]))
    rows = [line[7:] for line in draw_text(timeline, 400).splitlines() if line.startswith("rank")]
    assert sum(row.count(".") for row in rows) / sum(map(len, rows)) == pytest.approx(
        timeline.bubble_fraction, abs=0.01
    )


def test_png(tmp_path: Path) -> None:
    from matplotlib.image import imread

    timeline = simulate(build_schedule("1f1b", 4, 8))
    draw_png(timeline, tmp_path / "a.png", "1F1B")
    pixels = imread(tmp_path / "a.png")[..., :3].reshape(-1, 3)

    def share(color: str) -> float:
        wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return float((abs(pixels - wanted) < 0.004).all(axis=1).mean())

    forward, backward, idle = share("#3b6fb6"), share("#3f9b6c"), share("#eceef1")
    assert forward > 0.1  # labels and edges take a little of each block
    assert backward / forward == pytest.approx(2.0, rel=0.15)
    assert idle / (forward + backward + idle) == pytest.approx(timeline.bubble_fraction, rel=0.15)


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


def test_tool_predicts_and_reads_a_recording(tmp_path: Path) -> None:
    done = run_tool("--pp", 4, "--micro-batches", 8, "--png", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert draw_text(build_schedule("1f1b", 4, 8)) in done.stdout
    assert draw_text(simulate(build_schedule("1f1b", 4, 8))) in done.stdout
    assert "bubble     27.3%" in done.stdout and "in flight  4 3 2 1 " in done.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "run").mkdir()
    timeline = simulate(build_schedule("gpipe", 2, 3), Costs(0.01, 0.02))
    for rank in range(2):
        timeline.to_json_file(tmp_path / "run" / f"rank{rank}.json", rank)
    done = run_tool("--recorded", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "run, recorded, 3 micro-batches" in done.stdout
    assert "bubble     25.0%" in done.stdout and "makespan   0.12 s" in done.stdout

    # The timeline folder of a run: its last step is meant.
    for step in (20, 100):
        folder = tmp_path / "timeline" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        timeline.to_json_file(folder / "rank0.json", 0)
    timeline.to_json_file(folder / "rank1.json", 1)
    done = run_tool("--recorded", tmp_path / "timeline")
    assert done.returncode == 0 and "step-00000100, recorded, 3 micro-batches" in done.stdout, done.stderr


def test_tool_errors_are_one_line(tmp_path: Path) -> None:
    for arguments, complaint in (
        (("--schedule", "1f1"), "error: unknown pipeline schedule '1f1'; did you mean '1f1b'?"),
        (("--forward", 1, 2, "--pp", 3), "error: forward costs are given for 2 stages, and 2F0 runs on stage 2"),
        (("--recorded", tmp_path), "error: " + str(tmp_path) + " holds no .json file"),
    ):
        done = run_tool(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith(complaint) and done.stderr.count("\n") == 1
