"""Jobs whose ranks or launcher are killed or frozen at a random instant: all the others end, and nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import planted_faults
import pytest
from started_ranks import arguments, started, steps_done
from test_torchrun import OURS, TORCHS, in_proc, launched, runs

from megatron_ds.checkpoint.directory import steps_in
from megatron_ds.train.report import read_losses

pytestmark = pytest.mark.alone

STEPS = 12
MESHES: dict[str, list[str]] = {
    "dp": ["--mesh.dp", "2", "--zero.stage", "3"],
    "tp": ["--mesh.tp", "2"],
    "pp": ["--mesh.pp", "2"],
    "four": ["--mesh.tp", "2", "--mesh.dp", "2"],
}
SECONDS = 180.0
"""Within which all who are left have ended: they wait 20 s for each other, on a machine ten times as busy."""


@pytest.fixture(autouse=True)
def bounded() -> None:
    """In place of the folder's own: its limits would stay with the server that forks the ranks of other tests too."""


def ranks_of(mesh: str) -> int:
    return 4 if mesh == "four" else 2


def options(mesh: str) -> list[str]:
    own = ["--optimizer.decay-steps", str(STEPS), "--model.hidden-dropout", "0.1", "--timeout", "20"]
    own += ["--checkpoint.save-every", "3", "--checkpoint.keep-last", "2", "--log.no-progress"]
    return [*MESHES[mesh], *own, "--checkpoint.resume"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The uninterrupted run on a mesh, made when first asked for."""
    folder = tmp_path_factory.mktemp("whole")

    def of(mesh: str) -> Path:
        output = folder / mesh
        if not output.exists():
            finish(folder / f"{mesh}-ranks", output, mesh)
        return output

    return of


def finish(folder: Path, output: Path, mesh: str, steps: int = STEPS) -> None:
    """Do what is left of the steps."""
    own = arguments(output, "--train.steps", str(steps), *options(mesh))
    with started(folder, [own] * ranks_of(mesh)) as ranks:
        assert set(ranks.wait(SECONDS)) == {0}, ranks.everything()
    assert not list(output.rglob("*.tmp")) and not list(output.rglob("*.incomplete"))


@pytest.mark.trials(2, 100)
def test_ranks(draw: random.Random, whole: Callable[[str], Path], place: Path) -> None:
    mesh = draw.choice(sorted(MESHES))
    world, output = ranks_of(mesh), place / "run"
    number = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
    # One that is frozen keeps the others from their end by themselves; where all are, none is left to end.
    chosen = draw.sample(range(world), draw.randrange(1, world + (number == signal.SIGKILL)))
    print(f"{mesh}: {number.name} to {chosen}")
    step, more = draw.randrange(STEPS - 4), draw.random() * 0.06
    print(f"{more:.3f} s after step {step}")
    own = arguments(output, "--train.steps", str(STEPS), *options(mesh))
    with started(place / "ranks", [own] * world, planted_faults.is_slow) as ranks:
        ranks.wait_for(lambda: steps_done(output) >= step, SECONDS)
        time.sleep(more)
        for rank in chosen:
            ranks.signal(rank, number)
        others = [rank for rank in range(world) if rank not in chosen]
        until = time.monotonic() + SECONDS
        for rank in others:
            ranks.processes[rank].join(max(0.0, until - time.monotonic()))
            assert ranks.processes[rank].exitcode in (1, 2), ranks.everything()
        assert "Traceback" not in ranks.everything()
    assert steps_done(output) < STEPS, "it was over before that"
    kept = steps_in(output / "checkpoints")
    assert kept or steps_done(output) < 4
    finish(place / "again", output, mesh)
    assert read_losses(output) == read_losses(whole(mesh))
    final = Path("checkpoints") / f"step-{STEPS:08d}"
    for path in sorted((whole(mesh) / final).glob("*.safetensors")):
        assert (output / final / path.name).read_bytes() == path.read_bytes(), path.name


@in_proc
@pytest.mark.trials(1, 20)
def test_a_launcher(draw: random.Random, whole: Callable[[str], Path], place: Path) -> None:
    """And now and then a rank with it. What is left of the job ends; all ranks together save what they have done."""
    mesh = draw.choice(("dp", "tp", "pp"))
    module, with_rank = draw.choice((OURS, OURS, TORCHS)), draw.choice((None, None, 0, 1))
    print(f"{mesh}, {module}, with rank {with_rank}")
    output = place / "run"
    with launched(place, module, *options(mesh)) as job:
        time.sleep(draw.random() * 0.2)
        os.kill(job.launcher.pid, signal.SIGKILL)
        if with_rank is not None:
            os.kill(job.ranks[with_rank], signal.SIGKILL)
        job.launcher.wait()
        until = time.monotonic() + SECONDS
        while any(runs(rank) for rank in job.ranks):
            assert time.monotonic() < until, job.log.read_text()
            time.sleep(0.05)
        assert "Traceback" not in job.log.read_text(), job.log.read_text()
    done, kept = steps_done(output), [path.name for path in steps_in(output / "checkpoints")]
    print(f"{done} steps, {kept}")
    assert kept or done < 4
    assert with_rank is not None or kept[-1] == f"step-{done:08d}"
    losses = read_losses(whole(mesh))
    assert read_losses(output)[:STEPS] == losses[:done]
    finish(place / "again", output, mesh, done + 2)
    assert read_losses(output)[:STEPS] == losses[: done + 2] and steps_done(output) == done + 2
