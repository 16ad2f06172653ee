"""What goes wrong in the ranks of test_launch.py: each is called in a rank's process before it trains."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_ds.advice import rules, run_advice
from megatron_ds.train import launch
from megatron_ds.train.step import StepResult, TrainStep
from megatron_ds.zero.optimizer import ZeroOptimizer


def at_step(number: int, action: Callable[[], object]) -> None:
    """Run ``action`` on this rank at the beginning of step ``number`` of this process."""
    real, done = TrainStep.__call__, itertools.count(1)

    def call(self: TrainStep, micro_batches: Sequence[Any], stop: bool = False) -> StepResult:
        if next(done) == number:
            action()
        return real(self, micro_batches, stop)

    TrainStep.__call__ = call  # type: ignore[method-assign]


def raises(rank: int) -> None:
    def fail() -> None:
        raise ValueError("a planted fault")

    if rank == 1:
        at_step(2, fail)


def is_killed(rank: int) -> None:
    if rank == 1:
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGKILL))


def rank_0_is_killed(rank: int) -> None:
    if rank == 0:
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hears_of_the_end_late(rank: int) -> None:
    """A SIGTERM when the run has ended: SLURM does not signal all nodes at once."""
    destroy = dist.destroy_process_group

    def signalled() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        destroy()

    if rank == 1:
        dist.destroy_process_group = signalled


def hangs(rank: int) -> None:
    if rank == 1:
        at_step(2, sleep_for_ever)


def hangs_at_the_end(rank: int) -> None:
    """When the others already wait for its gradients."""

    def end(self: ZeroOptimizer, stage: int = 0) -> None:
        sleep_for_ever()

    if rank == 1:  # the rest of its gradients leave when its backward pass is over
        ZeroOptimizer.end_backward = end  # type: ignore[method-assign]


def sleep_for_ever() -> None:
    time.sleep(1000)


def is_stopped(rank: int) -> None:
    """Not even its watching thread answers."""
    if rank == 1:
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def speaks_at_once(rank: int) -> None:
    """No fault: it does not leave the first word to a rank 0 that is not there."""
    launch._RANK_0_SPEAKS_FIRST = 0.0


def rank_0_is_stopped(rank: int) -> None:
    """And with it the store: whoever asks waits for an answer."""
    if rank == 0:
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def rank_0_is_stopped_in_its_checks(rank: int) -> None:
    from megatron_ds.train import pretrain

    if rank == 0:
        pretrain.validate = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)  # type: ignore[assignment]


def rank_0_is_stopped_while_groups_are_made(rank: int) -> None:
    from megatron_ds.mesh import Mesh

    if rank == 0:
        Mesh.create = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)  # type: ignore[method-assign,assignment]


def is_slow(rank: int) -> None:
    """Steps of 50 ms, so that a signal comes while there are steps left."""
    real = TrainStep.__call__

    def call(self: TrainStep, *arguments: Any) -> StepResult:
        time.sleep(0.05)
        return real(self, *arguments)

    TrainStep.__call__ = call  # type: ignore[method-assign]


def disk_is_full_from_step_3(rank: int) -> None:
    """No file of this process grows beyond 64 KB any more: the checkpoint does not fit, the metrics do."""
    at_step(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY)))


def lacks_the_data(rank: int) -> None:
    """What the other ranks find, this one's machine does not have."""
    from megatron_ds.errors import DataError
    from megatron_ds.models import text_task

    def refuse(*arguments: Any, **settings: Any) -> None:
        raise DataError("no such dataset here")

    if rank == 1:
        text_task.open_sources = refuse  # type: ignore[assignment]


def advises_small_runs(rank: int) -> None:
    """No fault: every run is large enough for advice on its memory."""
    run_advice.FLOOR, rules.TRIFLE = 0.0, 0
