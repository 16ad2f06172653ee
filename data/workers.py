"""Tasks on worker processes, one pipe each: bounded, ordered in its errors, and without orphans.

A worker has one task at a time and one end of a pipe whose other end only its parent has. So nothing queues up, a
worker that dies is seen at once, and a worker whose parent died gets an error at its next message and ends.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from megatron_ds.errors import DataError, MegatronDSError

Task = TypeVar("Task")
Report = Callable[..., None]
Handler = Callable[[Task, Report], None]
"""Does a task; calls its second argument with numbers now and then, to show progress."""


def run_tasks(
    tasks: Iterator[Task], make_handler: Callable[[], Handler[Task]], workers: int, on_progress: Report
) -> None:
    """Do every task, in any order, on at most ``workers`` processes; with 0 in this process, in order.

    Args:
        tasks: made one ahead of need, in this process.
        make_handler: called once in each worker; it and the tasks are pickled.
        on_progress: called in this process with what a handler reports.

    Raises:
        DataError: a worker was killed.
        MegatronDSError: of a handler; if several fail, that of the earliest task.
        RuntimeError: any other exception of a handler, with its traceback.
    """
    if not workers:
        handler = make_handler()
        for task in tasks:
            handler(task, on_progress)
        return
    crew = _Crew(make_handler, workers, on_progress)
    try:
        for number, task in enumerate(tasks):
            if not crew.give(number, task):
                break
        crew.finish()
    finally:
        crew.close()


class _Crew:
    def __init__(self, make_handler: Callable[[], Handler[Task]], size: int, on_progress: Report):
        self._make_handler, self._size, self._on_progress = make_handler, size, on_progress
        # Spawned: forking a process that has threads may deadlock.
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[Connection, Any] = {}
        self._idle: list[Connection] = []
        self._busy: dict[Connection, int] = {}
        self._errors: dict[int, Exception] = {}

    def give(self, number: int, task: object) -> bool:
        """Hand a task to a worker, waiting for one to be free. False once a task has failed."""
        while not self._idle and len(self._processes) == self._size and not self._errors:
            self._listen()
        if self._errors:
            return False
        pipe = self._idle.pop() if self._idle else self._hire()
        self._busy[pipe] = number
        try:
            pipe.send(task)
        except OSError:
            self._lost(pipe)
        return True

    def finish(self) -> None:
        """Wait for the tasks that were given; after an error, only for those before the failed one."""
        while any(number < min(self._errors, default=number + 1) for number in self._busy.values()):
            self._listen()
        if self._errors:
            raise self._errors[min(self._errors)]

    def close(self) -> None:
        for pipe, process in self._processes.items():
            pipe.close()
            if pipe in self._busy:
                process.terminate()
            process.join()

    def _hire(self) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._make_handler), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process
        return ours

    def _listen(self) -> None:
        for pipe in wait(list(self._busy), timeout=1.0):
            assert isinstance(pipe, Connection)
            try:
                kind, *values = pipe.recv()
            except (EOFError, OSError):
                self._lost(pipe)
                continue
            if kind == "progress":
                self._on_progress(*values)
                continue
            number = self._busy.pop(pipe)
            self._idle.append(pipe)
            if kind == "error":
                self._errors[number] = values[0]

    def _lost(self, pipe: Connection) -> None:
        number = self._busy.pop(pipe)
        process = self._processes[pipe]
        process.join()
        self._errors[number] = DataError(
            f"a worker process was killed (exit status {process.exitcode}; out of memory?); run the same command "
            "again to continue where it was, perhaps with fewer workers"
        )


def _work(pipe: Connection, make_handler: Callable[[], Handler[Any]]) -> None:
    """The life of a worker process."""
    # One thread a worker: the workers are the parallelism.
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    try:
        handler = make_handler()
        while True:
            task = pipe.recv()
            try:
                handler(task, lambda *values: pipe.send(("progress", *values)))
            except (MegatronDSError, BrokenPipeError) as error:
                pipe.send(("error", error))
            except Exception as error:
                pipe.send(("error", RuntimeError(f"{error!r} in a worker:\n{traceback.format_exc()}")))
            else:
                pipe.send(("done",))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return  # the parent has closed the pipe, or is gone
