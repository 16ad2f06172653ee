"""A rank of a served model but the first, which may have started it (``python -m megatron_ds.inference.follower``)."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

from megatron_ds.data.cli import guarded
from megatron_ds.inference.llm import LLM
from megatron_ds.kernels.cpu.allocator import keep_freed_memory


def follow(arguments: dict[str, Any]) -> None:
    """Take part in what the first rank serves, until it says that it has ended.

    Raises:
        MegatronDSError: the model cannot be served, or the first rank is gone.
    """
    with LLM(**arguments) as llm:
        _leave_signals_to_the_first()
        keep_freed_memory()
        llm.follow()


def _leave_signals_to_the_first() -> None:
    """A terminal, a service manager and torchrun signal every process: the first rank answers what is under way, and
    tells the others to end when that is done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end_after(first: int, last_words: float = 5.0) -> None:
    """End this process soon after its parent, the first rank, has ended: it may still be trying to reach it.

    Args:
        first: the parent's process id. last_words: seconds that this rank has to say what has happened.
    """
    while os.getppid() == first:
        time.sleep(1.0)
    time.sleep(last_words)
    os._exit(1)


if __name__ == "__main__":
    _leave_signals_to_the_first()
    threading.Thread(target=_end_after, args=(int(sys.argv[2]),), daemon=True).start()
    sys.exit(guarded(lambda: follow(json.loads(sys.argv[1]))))
