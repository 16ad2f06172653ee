"""The newest checkpoint whose every checksum is right: the way on from one that was damaged."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ds.checkpoint.directory import look_at, read_latest, steps_in
from megatron_ds.checkpoint.manifest import step_of
from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.comm.together import exchange, merged
from megatron_ds.errors import CheckpointError
from megatron_ds.mesh import Axis


def last_good(directory: Path, world: Axis | None = None) -> tuple[Path, list[str]]:
    """Every rank: the newest good checkpoint under ``directory``, and what is wrong with those passed over for it.

    All bytes are read, the files of a checkpoint shared out among the ranks. The one that ``latest`` names comes first
    and those before it next: later ones are of a run that was taken up again from an earlier step, or that diverged.

    Raises:
        CheckpointError: the same on every rank: none is good.
    """
    world = world or Axis("world")
    names = json.loads(exchange(world, json.dumps(_in_order(directory)) if world.rank == 0 else "")[0])
    passed: list[str] = []
    for name in names:
        problem = merged(exchange(world, _problem(directory / name, world)))
        if not problem:
            return directory / name, passed
        passed.append(problem)
    wrong = "".join(f"\n  {problem}" for problem in passed) or " there is none at all"
    raise CheckpointError(f"{directory} holds no good checkpoint:{wrong}")


def _in_order(directory: Path) -> list[str]:
    steps = {path: step_of(path) or 0 for path in reversed(steps_in(directory))}
    try:
        newest = step_of(Path(read_latest(directory)))
    except CheckpointError:
        newest = None
    later = [path.name for path, step in steps.items() if newest is not None and step > newest]
    return [path.name for path in steps if path.name not in later] + later


def _problem(step: Path, world: Axis) -> str:
    """What is wrong with this rank's share of a checkpoint's files."""
    try:
        look_at(step, (world.rank, world.size))
        with Checkpoint(step) as checkpoint:
            problems = checkpoint.check_everything(share=(world.rank, world.size))
    except (CheckpointError, OSError) as error:
        return str(error)
    return "; ".join(problems[:3])
