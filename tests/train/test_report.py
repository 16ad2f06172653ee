"""Looking back at runs: curves are read, compared and drawn, and damaged ones are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_ds.errors import DataError
from megatron_ds.train.output import Output
from megatron_ds.train.report import draw_losses, largest_difference, plot_losses, read_losses


def write(folder: Path, steps: Sequence[int]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"step": step, "loss": 10.0 / step}) + "\n" for step in steps]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_losses_are_read_in_order(tmp_path: Path) -> None:
    assert read_losses(write(tmp_path, [1, 2, 4 - 1])) == [10.0, 5.0, 10.0 / 3]


@pytest.mark.parametrize("steps", [[2, 3], [1, 3], [1, 2, 2], [2, 1]])
def test_a_curve_with_gaps_or_doubles_is_refused(tmp_path: Path, steps: list[int]) -> None:
    with pytest.raises(DataError, match="does not hold steps 1 to"):
        read_losses(write(tmp_path, steps))


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is .* the output directory of a run"):
        read_losses(tmp_path / "nowhere")


def test_a_line_cut_off_by_a_crash_is_named(tmp_path: Path) -> None:
    with (write(tmp_path, [1, 2]) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    with pytest.raises(DataError, match="line 3"):
        read_losses(tmp_path)


def test_what_a_resumed_run_does_again_is_dropped(tmp_path: Path) -> None:
    output = Output(write(tmp_path, [1, 2, 3, 4]))
    with output.metrics.open("a") as file:
        file.write('{"step": 5, "lo')
    output.evaluation.write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 0.5}\n')
    output.truncate_metrics(3)
    assert len(read_losses(tmp_path)) == 3
    assert output.evaluation.read_text() == '{"step": 2, "loss": 1.0}\n'
    output.truncate_metrics(9)
    assert len(read_losses(tmp_path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.jsonl", "metrics.jsonl"]


def test_the_largest_difference_and_where_it_is() -> None:
    assert largest_difference([1.0, 2.0, 3.0], [1.0, 2.5, 2.75]) == (0.5, 2)
    assert largest_difference([1.0], [1.0]) == (0.0, 1)


@pytest.mark.parametrize("curves", [([1.0], [1.0, 2.0]), ([], [])])
def test_curves_that_cannot_be_compared(curves: tuple[list[float], list[float]]) -> None:
    with pytest.raises(DataError, match="same length"):
        largest_difference(*curves)


def test_a_nan_is_the_largest_difference() -> None:
    """A check of the form ``difference > limit`` must see it."""
    assert largest_difference([1.0, math.nan, 3.0], [1.0, 2.0, 5.0]) == (math.inf, 2)


@pytest.mark.parametrize("names", [["one"], ["one", "two"], ["one", "two", "three"]])
def test_the_picture_shows_every_curve_and_of_two_their_difference(tmp_path: Path, names: list[str]) -> None:
    from matplotlib import image

    curves = {name: [3.0, 2.0, 1.5 + i] for i, name in enumerate(names)}
    axes = draw_losses(curves, "a title").axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes[0].get_lines()}
    assert drawn == curves and axes[0].get_title() == "a title"
    if len(names) == 2:
        assert list(axes[1].get_lines()[0].get_ydata()) == [1e-12, 1e-12, 1.0]
    else:
        assert len(axes) == 1
    plot_losses(curves, tmp_path / "loss.png", "a title")
    pixels = image.imread(tmp_path / "loss.png")
    assert pixels.shape[:2] == ((660, 990) if len(names) == 2 else (440, 990)) and pixels[..., :3].min() < 0.2
