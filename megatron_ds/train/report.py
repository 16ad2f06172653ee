"""Looking back at runs: their losses, how far two runs differ, and the picture of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ds.errors import DataError
from megatron_ds.files import parse_json, read_bytes, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BYTES = 1 << 30
"""Of a run's metrics: some millions of steps."""


def read_losses(output: str | Path) -> list[float]:
    """The loss of every step of the run in directory ``output``, the first step first; NaN where it was not finite.

    Raises:
        DataError: no metrics, a damaged line, or steps missing in between.
    """
    path = Path(output) / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    try:
        for text in read_bytes(path, MOST_BYTES).splitlines():
            lines.append(parse_json(text))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; is {output} the output directory of a run?") from None
    except ValueError as error:
        raise DataError(
            f"{path}, line {len(lines) + 1} is damaged ({error}); resuming the run drops a line that a crash cut off"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not all(isinstance(line, dict) and {"step", "loss"} <= line.keys() for line in lines):
        raise DataError(f"{path} has lines without step and loss; the run's metrics are damaged")
    steps = [line["step"] for line in lines]
    if steps != list(range(1, len(steps) + 1)):
        raise DataError(f"{path} does not hold steps 1 to {len(steps)} in order; the run's metrics are damaged")
    return [math.nan if line["loss"] is None else line["loss"] for line in lines]


def largest_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, int]:
    """The largest absolute difference of two loss curves and the step (from 1) where it is; infinite at a NaN."""
    if len(a) != len(b) or not a:
        raise DataError(f"the runs have {len(a)} and {len(b)} steps; only curves of the same length can be compared")
    differences = [math.inf if math.isnan(x - y) else abs(x - y) for x, y in zip(a, b)]
    largest = max(differences)
    return largest, differences.index(largest) + 1


def plot_losses(
    curves: Mapping[str, Sequence[float]], path: str | Path, title: str, unit: str = "nats a token"
) -> None:
    """Loss over steps as a PNG; where there are two curves, their difference below on a logarithmic axis."""
    figure = draw_losses(curves, title, unit)
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def draw_losses(curves: Mapping[str, Sequence[float]], title: str, unit: str = "nats a token") -> Figure:
    """The picture of :func:`plot_losses` as a figure of matplotlib."""
    from matplotlib.figure import Figure

    two = len(curves) == 2
    figure = Figure(figsize=(9, 6 if two else 4))
    axes = figure.subplots(2 if two else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 1] if two else [1])
    # Two curves that should be one: the second thin and dashed on top of the first.
    styles: list[dict[str, Any]] = [{"linewidth": 1.2} for _ in curves]
    if two:
        styles = [{"linewidth": 3.5, "alpha": 0.45}, {"linewidth": 1.2, "color": "black", "linestyle": "--"}]
    for (name, losses), style in zip(curves.items(), styles):
        axes[0][0].plot(range(1, len(losses) + 1), losses, label=name, **style)
    axes[0][0].set_ylabel(f"loss ({unit})")
    axes[0][0].set_title(title)
    axes[0][0].legend()
    axes[0][0].grid(alpha=0.3)
    if two:
        a, b = curves.values()
        steps = min(len(a), len(b))
        axes[1][0].semilogy(range(1, steps + 1), [max(abs(x - y), 1e-12) for x, y in zip(a, b)], linewidth=1)
        axes[1][0].set_ylabel("|difference|")
        axes[1][0].grid(alpha=0.3)
    axes[-1][0].set_xlabel("step")
    figure.tight_layout()
    return figure
