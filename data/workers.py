"""Tasks on worker processes, one pipe each: bounded, ordered in its errors, and without orphans.

A worker has one task at a time and one end of a pipe whose other end only its parent has. So nothing queues up, a
worker that dies is seen at once, and a worker whose parent died gets an error at its next message and ends.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from megatron_ds.data.cli import REFUSALS
from megatron_ds.errors import DataError, MegatronDSError

Task = TypeVar("Task")
Result = TypeVar("Result")
Handler = Callable[[Task], Result]


def usable_cores() -> int:
    """Those that this process may run on, which in a container or a job are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    tasks: Iterator[Task], make_handler: Callable[[], Handler[Task, Result]], workers: int
) -> Generator[Result, None, None]:
    """The results of all tasks, in any order, from at most ``workers`` processes; with 0 from this one, in order.

    Tasks are made one ahead of need, in this process; ``make_handler`` is called once in each worker.

    Raises:
        DataError: a worker was killed.
        MegatronDSError, OSError: of a handler, such as a full disk; if several fail, that of the earliest task.
        RuntimeError: any other exception of a handler, with its traceback.
    """
    if not workers:
        yield from map(make_handler(), tasks)
        return
    crew = _Crew(make_handler, workers)
    try:
        for number, task in enumerate(tasks):
            while crew.is_full and not crew.errors:
                yield from crew.listen()
            if crew.errors:
                break
            crew.give(number, task)
        # After an error those tasks alone are waited for that came before the failed one.
        while any(number < min(crew.errors, default=number + 1) for number in crew.busy.values()):
            yield from crew.listen()
        if crew.errors:
            raise crew.errors[min(crew.errors)]
    finally:
        crew.close()


class _Crew:
    """Attributes: ``busy``, the number of the task at the other end of each pipe; ``errors`` of tasks by number."""

    def __init__(self, make_handler: Callable[[], Handler[Any, Any]], size: int):
        self._make_handler, self._size = make_handler, size
        # Spawned: forking a process that has threads may deadlock.
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[Connection, Any] = {}
        self.busy: dict[Connection, int] = {}
        self.errors: dict[int, Exception] = {}

    @property
    def is_full(self) -> bool:
        return len(self.busy) == self._size

    def give(self, number: int, task: object) -> None:
        """Hand a task to a worker that is free, or to a new one."""
        free = self._processes.keys() - self.busy.keys()
        pipe = free.pop() if free else self._hire()
        self.busy[pipe] = number
        try:
            pipe.send(task)
        except OSError:
            self._lost(pipe)

    def listen(self) -> Iterator[Any]:
        """The results that come within a second."""
        for pipe in wait(list(self.busy), timeout=1.0):
            assert isinstance(pipe, Connection)
            try:
                result, error = pipe.recv()
            except (EOFError, OSError):
                self._lost(pipe)
                continue
            number = self.busy.pop(pipe)
            if error is None:
                yield result
            else:
                self.errors[number] = error

    def close(self) -> None:
        for pipe, process in self._processes.items():
            pipe.close()
            if pipe in self.busy:
                process.terminate()
            process.join()

    def _hire(self) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._make_handler), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process
        return ours

    def _lost(self, pipe: Connection) -> None:
        process = self._processes.pop(pipe)
        process.join()
        pipe.close()
        self.errors[self.busy.pop(pipe)] = DataError(
            f"a worker process was killed (exit status {process.exitcode}; out of memory?); run the same command "
            "again to continue where it was, perhaps with fewer workers"
        )


def _work(pipe: Connection, make_handler: Callable[[], Handler[Any, Any]]) -> None:
    """The life of a worker process."""
    # One thread a worker: the workers are the parallelism.
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    try:
        handler = make_handler()
        while True:
            task = pipe.recv()
            result: Any = None
            error: Exception | None = None
            try:
                result = handler(task)
            except MegatronDSError as failure:
                error = failure
            except Exception as failure:
                refused = isinstance(failure, OSError) and failure.errno in REFUSALS
                error = failure if refused else RuntimeError(f"{failure!r} in a worker:\n{traceback.format_exc()}")
            pipe.send((result, error))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return  # the parent has closed the pipe, or is gone
