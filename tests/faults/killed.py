"""Kill a piece of work at a random instant: in a fork of this process, which has everything imported.

Two kinds of instant. At the n-th *event*, where an event is a call of a Python or C function or a return from one, on
whatever thread: the same for the same seed. And after a time, by the kernel and wherever the process is, in the middle
of a write too. Nothing is told to the process: it is gone, as after SIGKILL.
"""

from __future__ import annotations

import itertools
import os
import random
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

SECONDS = 120
"""Within which what is killed has ended, or hangs."""


@dataclass(frozen=True)
class Span:
    """How long a piece of work is when nobody kills it."""

    events: int
    seconds: float


def span_of(work: Callable[[], object]) -> Span:
    """Do the work once. It takes about twice as long while its events are counted."""
    start = time.perf_counter()
    events = int(_forked(work, 0, 0.0))
    return Span(events, (time.perf_counter() - start) / 2)


def killed(draw: random.Random, work: Callable[[], object], span: Span, share: float = 0.7) -> bool:
    """Begin the work, and kill it at an instant of its span. False where it had ended before that.

    Args:
        share: of instants that are events; the others are times.
    """
    if draw.random() < share:
        at, after = draw.randrange(1, span.events + 1), 0.0
        print(f"killed at event {at} of {span.events}")
    else:
        at, after = 0, max(span.seconds * draw.random(), 1e-4)
        print(f"killed after {after:.4f} of {span.seconds:.4f} s")
    return not _forked(work, at, after)


def _forked(work: Callable[[], object], at: int, after: float) -> str:
    """What a fork says when it has done the work: its number of events. Nothing if it was killed."""
    ours, theirs = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(work, at, after, theirs)
    os.close(theirs)
    ready, _, _ = select.select([ours], [], [], SECONDS)
    told = os.read(ours, 1 << 16).decode() if ready else ""
    os.close(ours)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert ready, f"still there after {SECONDS} s"
    assert not told.startswith("Traceback"), told
    assert told or os.WIFSIGNALED(status), status
    return told


def _child(work: Callable[[], object], at: int, after: float, pipe: int) -> None:
    told = ""
    # Its own is a semaphore that forks share: one that is killed while it has it would leave it taken.
    tqdm.set_lock(threading.RLock())
    try:
        os.fsync = os.fdatasync = lambda fd: None  # what a process has written stays when it is killed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        count = itertools.count(1)

        def look(*_: Any) -> None:
            if next(count) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        if after:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, after)
        else:
            threading.setprofile(look)
            sys.setprofile(look)
        work()
        sys.setprofile(None)
        threading.setprofile(None)
        told = str(next(count))
    except BaseException:
        sys.setprofile(None)
        told = traceback.format_exc()
    os.write(pipe, told.encode()[: 1 << 15])
    os._exit(0)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
