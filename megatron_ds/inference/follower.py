"""A rank of a served model but the first, which may have started it (``python -m megatron_ds.inference.follower``)."""

from __future__ import annotations

import json
import signal
import sys
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


if __name__ == "__main__":
    _leave_signals_to_the_first()
    sys.exit(guarded(lambda: follow(json.loads(sys.argv[1]))))
