"""Ranks of examples/pretrain_gpt.py as real processes, started by hand with the environment that torchrun would set.

A fork server with torch imported starts one in a fraction of a second. Each has its own arguments and a fault of its
own to have, its output goes to a file, and its exit code is what a launcher would see.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from scripts_as_modules import load_script

from megatron_ds import testing
from megatron_ds.train.launch import RankInfo, run_main

ROOT = Path(__file__).parents[2]

# The smallest run there is: some steps of a few milliseconds.
TINY = [
    *("--model.num-layers", "2", "--model.hidden-size", "16", "--model.num-heads", "2", "--model.vocab-size", "61"),
    *("--model.vocab-multiple", "4", "--train.sequence-length", "8", "--train.global-batch", "4"),
    *("--train.steps", "4", "--device", "cpu", "--threads", "1", "--data.synthetic", "--log.no-tensorboard"),
]


def arguments(output: Path, *more: str) -> list[str]:
    """Of the smallest run, into a folder."""
    return [*TINY, "--output", str(output), *more]


def steps_done(output: Path) -> int:
    """Lines of a run's metrics."""
    path = output / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def pretrain_gpt() -> types.ModuleType:
    """The example as a module."""
    module = load_script("examples/pretrain_gpt.py")
    return module


@dataclass
class Ranks:
    """Processes under way; ``output(rank)`` is what one has printed so far."""

    processes: list[BaseProcess]
    folder: Path

    def output(self, rank: int) -> str:
        return (self.folder / f"rank-{rank}.txt").read_text()

    def pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.pid(rank), number)

    def wait_for(self, condition: Callable[[], object], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"it did not happen in {seconds} s:\n{self.everything()}"
            assert any(process.is_alive() for process in self.processes), f"all ranks have ended:\n{self.everything()}"
            time.sleep(0.02)

    def wait(self, seconds: float = 60.0) -> list[int | None]:
        """Exit codes by rank, negative for a signal; an error if a rank is still there after ``seconds``."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        assert None not in codes, f"exit codes {codes} after {seconds} s:\n{self.everything()}"
        return codes

    def everything(self) -> str:
        return "\n".join(f"--- rank {rank}\n{self.output(rank)}" for rank in range(len(self.processes)))


def free_port() -> str:
    """Below those that the kernel gives to connections: of which another test could get it before a rank listens."""
    while True:
        port = random.SystemRandom().randrange(15_000, 29_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("localhost", port))
            return str(port)


@contextlib.contextmanager
def started(
    folder: Path,
    arguments: Sequence[Sequence[str]],
    fault: Callable[[int], None] | None = None,
    environment: Sequence[dict[str, str]] | None = None,
    main: Callable[[RankInfo], int] | None = None,
) -> Iterator[Ranks]:
    """One rank for each list of ``arguments``.

    Args:
        fault: a module-level function, called with the rank in its process before training.
        environment: by rank, what to set besides (or instead of) what torchrun would.
        main: a module-level function, what each rank runs; default: examples/pretrain_gpt.py's.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(testing.modules_to_preload())
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes: list[BaseProcess] = []
    try:
        for rank, own in enumerate(arguments):
            world = str(len(arguments))
            env = {"RANK": str(rank), "WORLD_SIZE": world, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": world}
            env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            env = env if len(arguments) > 1 else {}
            env |= environment[rank] if environment is not None else {}
            path = folder / f"rank-{rank}.txt"
            path.touch()
            process = context.Process(target=_run, args=(rank, list(own), env, str(path), fault, main), daemon=True)
            with testing._plain_main(_run):
                process.start()
            processes.append(process)
        yield Ranks(processes, folder)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _run(
    rank: int,
    arguments: list[str],
    environment: dict[str, str],
    path: str,
    fault: Callable[[int], None] | None,
    main: Callable[[RankInfo], int] | None,
) -> None:
    gc.freeze()  # as in megatron_ds.testing
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # A fork server's child has no streams of its own that are worth keeping.
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["pretrain_gpt.py", *arguments]
    if fault is not None:
        fault(rank)
    code = run_main(main or pretrain_gpt().main)
    sys.stdout.flush()
    sys.exit(code)
