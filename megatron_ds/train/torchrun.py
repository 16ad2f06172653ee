"""``torchrun`` that lets its ranks finish: ``python -m megatron_ds.train.torchrun``, with torchrun's own arguments.

A SIGTERM or Ctrl-C makes torchrun itself tell its ranks, and then fail with a traceback whatever they do: a run that
saved and ended well looks like one that crashed. Here the signal goes to the ranks alone, and torchrun ends as they
do: with 0 after they have saved. SLURM signals every process of a job, and so ranks may hear of it twice; that is one
request to them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from torch.distributed.run import main as torchrun

_OURS = (signal.SIGTERM, signal.SIGINT)
_THEIRS = "SIGHUP,SIGQUIT"


def main(arguments: list[str]) -> None:
    """Run torchrun; returns when all ranks ended well, and raises what it raises."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    threading.Thread(target=_pass_on, args=(receiver,), name="signals", daemon=True).start()
    for number in _OURS:
        signal.signal(number, lambda *_: None)
    # The C handler writes the number there at once, also while the main thread waits for other nodes in C.
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    torchrun(["--signals-to-handle", _THEIRS, *arguments])


def _pass_on(receiver: socket.socket) -> None:
    while number := receiver.recv(1):
        if number[0] not in _OURS:
            continue
        ranks = children(os.getpid())
        if not ranks:
            os._exit(128 + number[0])  # nothing has started yet
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(rank, number[0])


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
    main(sys.argv[1:])
