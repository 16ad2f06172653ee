"""``torchrun`` that lets its ranks finish: ``python -m megatron_ds.train.torchrun``, with torchrun's own arguments.

A SIGTERM or Ctrl-C makes torchrun itself tell its ranks, and then fail with a traceback whatever they do: a run that
saved and ended well looks like one that crashed. Here the signal goes to the ranks alone, and torchrun ends as they
do: with 0 after they have saved. SLURM signals every process of a job, and so ranks may hear of it twice; that is one
request to them. SIGUSR1 asks for the same. A second Ctrl-C ends them at once, those too that no longer listen.

Exit codes: 0; 2 for what the user can mend, which a rank has said; 130 and 143 for Ctrl-C and SIGTERM before there was
anything to save, and 130 for a second Ctrl-C; 1 for all else. torchrun's own account of a failure is forty lines and
more, of which none says why, below the one that does: here it is a line, and none where a rank has said it all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from megatron_ds.train.launch import clear_launch_environment
from megatron_ds.train.signals import LAUNCHER, ONE_CTRL_C, REQUESTS

_OURS = (*REQUESTS, signal.SIGINT)
_THEIRS = "SIGHUP,SIGQUIT"
_ENDS_WITHIN = 5.0  # seconds from a second Ctrl-C: a rank that can end by itself has done so in 4

_NOTICES_WITHIN = 1.0  # seconds, ten times torchrun's interval, in which it notices that its ranks have ended


def main(arguments: list[str]) -> int:
    """Run torchrun and return an exit code; raises what it raises besides the failure of a rank."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    twice, done = threading.Event(), threading.Event()
    threading.Thread(target=_pass_on, args=(receiver, twice, done), name="signals", daemon=True).start()
    for number in _OURS:
        signal.signal(number, lambda *_: None)
    # The C handler writes the number there at once, also while the main thread waits for other nodes in C.
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    os.environ[LAUNCHER] = str(os.getpid())
    for name, value in rendezvous_environment(arguments).items():
        os.environ.setdefault(name, value)
    # "Sending process closing signal", "failed (exitcode: 2)": `conclude` says it.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(lambda record: False)
    # Five lines to say that each rank gets one thread for OpenMP; the run's --threads decides.
    logging.getLogger("torch.distributed.run").addFilter(lambda record: "OMP_NUM_THREADS" not in record.getMessage())
    _tell_of_success(done)
    try:
        torchrun(["--signals-to-handle", _THEIRS, *arguments])
    except ChildFailedError as error:
        code, line = conclude({rank: failure.exitcode for rank, failure in error.failures.items()}, twice.is_set())
        if line:
            print(line, file=sys.stderr, flush=True)
        return code
    return 0


def rendezvous_environment(arguments: Sequence[str]) -> dict[str, str]:
    """A store of the ranks' own for each round of a rendezvous in which nodes come and go (``--rdzv-backend c10d``).

    The one that torch shares by default keeps its address from the first round, and a node that joins later, or once
    more, waits for it in vain.
    """
    elastic = any(argument.replace("_", "-").startswith("--rdzv-backend") for argument in arguments)
    return {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if elastic else {}


def run_job(command: list[str]) -> int:
    """Run the command of a job, for a program that has more to do; returns 0 only if it should go on to do it.

    Ctrl-C and SIGTERM are the job's: it saves, and this waits for that. `subprocess.run` would kill a launcher a
    quarter of a second after Ctrl-C and leave its ranks alone.

    Returns:
        The job's exit code; 130 or 143 where it ended well because it was asked to.
    """
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        process.send_signal(number)

    process = subprocess.Popen(command, env=clear_launch_environment())
    before = {number: signal.signal(number, pass_on) for number in _OURS}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code or (128 + asked[0] if asked else 0)


def run_script(script: Path, ranks: int, arguments: list[str]) -> None:
    """Run a pretraining example on this many ranks of this machine; a failure ends this program with its exit code."""
    launcher = ["-m", "megatron_ds.train.torchrun", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    status = run_job([sys.executable, *launcher, str(script), *arguments])
    if status:
        sys.exit(status)


def conclude(codes: dict[int, int], twice: bool) -> tuple[int, str]:
    """Exit code and last line for a job of which some ranks failed.

    Args:
        codes: exit codes of this node's ranks that failed, by rank; negative for a signal.
        twice: Ctrl-C was pressed a second time.
    """
    if twice:
        # Below a progress bar that its rank did not live to close.
        return 128 + signal.SIGINT, "\ninterrupted at once; what was saved before is as it was"
    # torchrun ends with SIGTERM the ranks that outlive one that failed.
    own = {rank: code for rank, code in codes.items() if -code not in REQUESTS}
    if not own:
        return 128 + signal.SIGTERM, "stopped by a signal before training started"
    # The others of a rank that met a mistake after the start end with 1, on its account.
    if {2} <= set(own.values()) <= {1, 2}:
        return 2, ""
    if set(own.values()) <= {128 + signal.SIGINT, -signal.SIGINT}:
        return 128 + signal.SIGINT, "interrupted before training started"
    said = ", ".join(f"rank {rank} {_ending(code)}" for rank, code in sorted(own.items())[:16])
    return 1, f"the job failed: {said}{', ...' if len(own) > 16 else ''}; see the first error above"


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _tell_of_success(done: threading.Event) -> None:
    """Set ``done`` when the ranks of this node have all ended well; torchrun then waits for the other nodes."""
    wait = SimpleElasticAgent._exit_barrier

    def tell_and_wait(agent: SimpleElasticAgent) -> None:
        done.set()
        wait(agent)

    SimpleElasticAgent._exit_barrier = tell_and_wait  # type: ignore[method-assign]


def _pass_on(receiver: socket.socket, twice: threading.Event, done: threading.Event) -> None:
    first: float | None = None
    while number := receiver.recv(1):
        if number[0] not in _OURS:
            continue
        ranks = children(os.getpid())
        if not ranks:
            if done.wait(_NOTICES_WITHIN):
                continue  # they have saved, perhaps for a signal that another node got earlier
            os._exit(128 + number[0])  # nothing has started yet
        now = time.monotonic()
        if first is None:
            first = now
        elif number[0] == signal.SIGINT and now - first > ONE_CTRL_C and not twice.is_set():
            twice.set()
            # torchrun itself gives a rank that does not listen 30 s.
            threading.Thread(target=_end, args=(ranks,), name="end", daemon=True).start()
        _send(ranks, number[0])


def _send(ranks: list[int], number: int) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(rank, number)


def _end(ranks: list[int]) -> None:
    time.sleep(_ENDS_WITHIN)
    _send([rank for rank in ranks if rank in children(os.getpid())], signal.SIGKILL)


def children(parent: int) -> list[int]:
    """Process ids of the children of ``parent``, which are torchrun's ranks."""
    if not Path("/proc/self/stat").exists():  # not Linux
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        return [int(line.split()[0]) for line in table.splitlines() if int(line.split()[1]) == parent]
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        # The name before the last parenthesis may hold anything; then come the state and the parent.
        with contextlib.suppress(OSError):  # it has just ended
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(folder.name))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
