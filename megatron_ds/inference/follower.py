"""A rank that the first one of a served model has started (``python -m megatron_ds.inference.follower``)."""

from __future__ import annotations

import json
import os
import signal
import sys

from megatron_ds.inference.llm import LLM
from megatron_ds.kernels.cpu.allocator import keep_freed_memory


def main(options: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first rank, which tells the others
    llm = LLM(**json.loads(options))
    keep_freed_memory()
    try:
        llm.follow()
    except RuntimeError as error:
        why, rank = str(error).splitlines()[0], os.environ["RANK"]
        sys.exit(f"rank {rank} ends: the first rank of the served model is gone ({why})")


if __name__ == "__main__":
    main(sys.argv[1])
