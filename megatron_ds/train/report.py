"""Looking back at runs: their losses, how far two runs differ, and the picture of both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ds.errors import DataError


def read_losses(output: str | Path) -> list[float]:
    """The loss of every step of the run in directory ``output``, the first step first.

    Raises:
        DataError: no metrics, or steps missing in between.
    """
    path = Path(output) / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; is {output} the output directory of a run?") from None
    steps = [line["step"] for line in lines]
    if steps != list(range(1, len(steps) + 1)):
        raise DataError(f"{path} does not hold steps 1 to {len(steps)} in order; the run's metrics are damaged")
    return [line["loss"] for line in lines]


def largest_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, int]:
    """The largest absolute difference of two loss curves and the step (from 1) where it is."""
    if len(a) != len(b) or not a:
        raise DataError(f"the runs have {len(a)} and {len(b)} steps; only curves of the same length can be compared")
    difference, at = max((abs(x - y), i) for i, (x, y) in enumerate(zip(a, b)))
    return difference, at + 1


def plot_losses(curves: Mapping[str, Sequence[float]], path: str | Path, title: str) -> None:
    """Loss over steps as a PNG; where there are two curves, their difference below on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    two = len(curves) == 2
    figure, axes = plt.subplots(
        2 if two else 1,
        1,
        figsize=(9, 6 if two else 4),
        sharex=True,
        squeeze=False,
        height_ratios=[3, 1] if two else [1],
    )
    styles: list[dict[str, Any]] = [
        {"linewidth": 3.5, "alpha": 0.45},
        {"linewidth": 1.2, "color": "black", "linestyle": "--"},
    ]
    for (name, losses), style in zip(curves.items(), styles):
        axes[0][0].plot(range(1, len(losses) + 1), losses, label=name, **style)
    axes[0][0].set_ylabel("loss (nats a token)")
    axes[0][0].set_title(title)
    axes[0][0].legend()
    axes[0][0].grid(alpha=0.3)
    if two:
        a, b = curves.values()
        axes[1][0].semilogy(range(1, len(a) + 1), [max(abs(x - y), 1e-12) for x, y in zip(a, b)], linewidth=1)
        axes[1][0].set_ylabel("|difference|")
        axes[1][0].grid(alpha=0.3)
    axes[-1][0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
