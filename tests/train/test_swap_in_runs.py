"""Runs whose state lies on a disk that fails, and ranks that die while they swap: all ranks end with one clear error,
nothing stays on the disk, and a resume gives the uninterrupted run's numbers, bit for bit."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import swap_faults
from small_disk import small_disk, used
from started_ranks import TINY, started

from megatron_ds.train.report import read_losses

pytestmark = pytest.mark.alone

SECONDS = 45.0
"""After which a rank that is still there fails the test; the runs take two or three."""


def arguments(output: Path, swap: Path) -> list[str]:
    """Two data-parallel ranks at stage 3 with everything on the disk, a checkpoint every other step of six."""
    nvme = [f"--zero.offload-{part}.{key}" for part in ("optimizer", "parameters") for key in ("device", "path")]
    values = ["nvme", str(swap)] * 2
    return [
        *(*TINY, "--output", str(output), "--mesh.dp", "2", "--train.steps", "6", "--timeout", "20"),
        *("--zero.stage", "3", "--zero.persistence-threshold", "0", "--zero.bucket-mb", "0.01"),
        *(word for pair in zip(nvme, values) for word in pair),
        *("--checkpoint.save-every", "2", "--checkpoint.resume"),
    ]


def train(
    folder: Path, output: Path, swap: Path, fault: Callable[[int], None] | None = None
) -> tuple[list[int | None], str]:
    """Exit codes of both ranks, and all they said."""
    with started(folder, [arguments(output, swap)] * 2, fault) as ranks:
        return ranks.wait(SECONDS), ranks.everything()


def numbers(output: Path) -> tuple[list[float], dict[str, bytes]]:
    """The losses, and the tensors of the last checkpoint."""
    last = max((output / "checkpoints").iterdir(), key=lambda path: path.name)
    return read_losses(output), {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("whole")
    codes, said = train(folder, folder / "run", folder / "swap")
    assert codes == [0, 0], said
    found = numbers(folder / "run")
    assert len(found[0]) == 6 and found[1]
    return found


def check_resume(folder: Path, output: Path, want: tuple[list[float], dict[str, bytes]]) -> None:
    """On another disk, from the checkpoint of step 2."""
    assert [path.name for path in sorted((output / "checkpoints").iterdir())][-1].endswith("2")
    codes, said = train(folder / "again", output, folder / "other-swap")
    assert codes == [0, 0], said
    assert "step 2" in said, said
    losses, tensors = numbers(output)
    assert losses == want[0]
    assert tensors.keys() == want[1].keys() and all(tensors[name] == want[1][name] for name in tensors)


# Which transfer after the second checkpoint: of some forty a step, and of those while the next checkpoint is saved.
MOMENTS = [(name, random.Random(f"{name} {i}").randrange(60)) for name in ("pwrite", "preadv") for i in range(2)]


def test_a_rank_killed_in_the_middle_of_a_swap(
    tmp_path: Path, uninterrupted: tuple[list[float], dict[str, bytes]]
) -> None:
    """In a few jobs at once, which mostly wait: whoever is left gives the dead rank seconds to answer."""
    with ExitStack() as stack:
        jobs = []
        for name, number in MOMENTS:
            folder = tmp_path / f"{name}-{number}"
            disk = stack.enter_context(small_disk(folder, 8))
            fault = partial(swap_faults.killed_in_transfer, name, number)
            given = [arguments(folder / "run", disk)] * 2
            jobs.append((folder, disk, used(disk), stack.enter_context(started(folder / "ranks", given, fault))))
        for _, disk, before, ranks in jobs:
            codes, said = ranks.wait(SECONDS), ranks.everything()
            assert codes == [1, -signal.SIGKILL], said
            assert "no answer from rank 1: killed" in said and "Traceback" not in said, said
            assert sorted(path.name for path in disk.iterdir()) == ["lost+found"]
            assert used(disk) == before, "swap files without a name are gone as well"
    for folder, *_ in jobs[::2]:  # one that was writing, one that was reading
        check_resume(folder, folder / "run", uninterrupted)


FAULTS = [
    (swap_faults.disk_is_full, "cannot be written: No space left on device", "make room"),
    (swap_faults.disk_is_taken_away, "Input/output error", "Resume from the last checkpoint"),
]


@pytest.mark.parametrize(("fault", "what", "way_out"), FAULTS, ids=["full", "gone"])
def test_a_disk_that_fails_in_the_middle_of_a_run(
    tmp_path: Path,
    fault: Callable[[str, int], None],
    what: str,
    way_out: str,
    uninterrupted: tuple[list[float], dict[str, bytes]],
) -> None:
    with small_disk(tmp_path, 8) as disk:
        codes, said = train(tmp_path / "ranks", tmp_path / "run", disk, partial(fault, str(disk)))
    check_refused(codes, said, what, way_out)
    check_resume(tmp_path, tmp_path / "run", uninterrupted)


def check_refused(codes: list[int | None], said: str, *words: str) -> None:
    """The user's error, said once and without a traceback, and no rank goes on."""
    assert 2 in codes and set(codes) <= {1, 2}, said
    assert said.count("error: offloaded state of ") == 1, said
    assert all(word in said for word in words), said
    assert "Traceback" not in said, said


def test_a_byte_that_changes_on_the_disk_stops_the_run(tmp_path: Path) -> None:
    codes, said = train(tmp_path / "ranks", tmp_path / "run", tmp_path / "swap", swap_faults.byte_is_flipped)
    check_refused(codes, said, "damaged: their checksum is not the one", "Resume from the last checkpoint")
    assert "of the swap file" in said
