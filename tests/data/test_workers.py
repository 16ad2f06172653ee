"""Tasks on worker processes: all are done, the earliest error is told, a killed worker is seen."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ds.data.workers import run_tasks
from megatron_ds.errors import DataError


def make_handler() -> Callable[[tuple[str, float]], int]:
    def handle(task: tuple[str, float]) -> int:
        what, seconds = task
        time.sleep(seconds)
        if what == "data error":
            raise DataError(f"after {seconds} s")
        if what == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if what == "defect":
            raise ZeroDivisionError
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what != "quiet":
            Path(what).touch()
        return os.getpid()

    return handle


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_task_is_done_and_has_a_result(tmp_path: Path, workers: int) -> None:
    tasks = ((str(tmp_path / str(n)), 0.0) for n in range(20))
    results = list(run_tasks(tasks, make_handler, workers))
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == list(range(20))
    assert len(results) == 20
    assert (os.getpid() in results) == (workers == 0)
    assert len(set(results)) <= max(workers, 1)


def run(*tasks: tuple[str, float]) -> None:
    list(run_tasks(iter(tasks), make_handler, 2))


def test_the_error_of_the_earliest_task_wins() -> None:
    with pytest.raises(DataError, match=r"after 1\.5 s"):
        run(("data error", 1.5), ("data error", 0.0), ("quiet", 0.0))


def test_tasks_after_an_error_are_not_waited_for() -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=r"after 0\.0 s"):
        run(("data error", 0.0), ("quiet", 60.0))
    assert time.monotonic() - start < 30


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ZeroDivisionError.* in a worker:.*raise ZeroDivisionError"):
        run(("defect", 0.0))


def test_what_the_system_refuses_a_worker_is_told_as_it_is() -> None:
    with pytest.raises(OSError, match="No space left on device") as told:
        run(("full", 0.0), ("quiet", 0.0))
    assert told.value.errno == errno.ENOSPC


def test_a_killed_worker_is_said() -> None:
    with pytest.raises(DataError, match=r"a worker process was killed \(exit status -9; out of memory\?\)"):
        run(("kill", 0.0), ("quiet", 0.0))


def test_no_task_at_all() -> None:
    run()
