"""What the demonstrations share: a run on a mesh of ranks, the same on one process, and what is said of both."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ds.train.launch import gpu_count
from megatron_ds.train.report import largest_difference, plot_losses, read_losses
from megatron_ds.train.torchrun import run_script

_ROUNDING = 1e-3  # by which losses of fp32 may differ between meshes


def mesh_for(gpus: int) -> tuple[int, list[str]]:
    """Ranks and mesh settings of a demonstration: 8 ranks on a CPU or 8 GPUs, else the largest mesh of the GPUs."""
    ranks = 8 if gpus in (0, 8) or gpus > 8 else 4 if gpus >= 4 else min(gpus, 2)
    tp, pp = {8: (2, 2), 4: (2, 2), 2: (2, 1), 1: (1, 1)}[ranks]
    if 0 < gpus < 8:
        print(f"{gpus} GPU(s), not 8: training on {ranks} rank(s), TP {tp} x PP {pp} x DP {ranks // (tp * pp)}")
    return ranks, ["--mesh.tp", str(tp), "--mesh.pp", str(pp)]


@dataclass(frozen=True)
class TwoRuns:
    """A run on ``ranks`` ranks, whose output directory is ``output``, and one with its seed on one process."""

    ranks: int
    output: Path
    losses: Sequence[float]
    difference: float
    step: int
    plot: Path
    start: float

    def report(self, said: Sequence[str], made: Sequence[tuple[str, Path]]) -> None:
        """Say what came of it, with more lines and more of what was ``made``; ends this program with an error where the
        losses differ by more than rounding."""
        print(f"\nloss {self.losses[0]:.4f} -> {self.losses[-1]:.4f} in {len(self.losses)} steps")
        print(
            f"largest difference between {self.ranks} ranks and 1 process: {self.difference:.2e} (step {self.step}), "
            "in fp32"
        )
        for line in said:
            print(line)
        checkpoints, board = self.output / "checkpoints", self.output / "tensorboard"
        for what, path in (("loss curve", self.plot), *made, ("checkpoint", checkpoints), ("TensorBoard", board)):
            print(f"{what:<20}{path}")
        print(f"{time.perf_counter() - self.start:.0f} s in all")
        if self.difference > _ROUNDING:
            sys.exit(f"error: the losses differ by {self.difference:.2e}, more than rounding explains ({_ROUNDING})")


def run_twice(script: Path, settings: Sequence[str], root: Path, title: str, unit: str, start: float) -> TwoRuns:
    """Run a pretraining example on a mesh of ranks and on one process, into folders under ``root``, and plot the
    losses. A run that fails ends this program.

    Args:
        start: when the demonstration began, by ``time.perf_counter``.
    """
    ranks, mesh = mesh_for(gpu_count())
    name = time.strftime("%Y%m%d-%H%M%S")
    many, one = root / f"{name}-{ranks}-ranks", root / f"{name}-1-process"
    run_script(script, ranks, [*settings, *mesh, "--output", str(many)])
    print("\nthe same seed on one process:", flush=True)
    # One thread: two that share busy cores wait for each other, and a step took 17 s instead of half a second.
    alone = ["--threads", "1", "--mesh.tp", "1", "--mesh.pp", "1", "--checkpoint.no-save-at-end"]
    run_script(script, 1, [*settings, *alone, "--output", str(one)])
    curves = {f"{ranks} ranks": read_losses(many), "1 process": read_losses(one)}
    plot_losses(curves, root / "loss.png", title, unit)
    losses = curves[f"{ranks} ranks"]
    return TwoRuns(ranks, many, losses, *largest_difference(*curves.values()), root / "loss.png", start)
