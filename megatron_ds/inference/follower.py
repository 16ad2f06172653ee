"""A rank that the first one of a served model has started (``python -m megatron_ds.inference.follower``)."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from megatron_ds.inference.llm import LLM
from megatron_ds.kernels.cpu.allocator import keep_freed_memory


def main(rank: str, port: str, settings: str) -> None:
    values = json.loads(settings)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first rank, which tells the others
    llm = LLM(Path(values.pop("model")), **values, place=(int(rank), int(port)))
    keep_freed_memory()
    try:
        llm.follow()
    except RuntimeError as error:
        sys.exit(f"rank {rank} ends: the first rank of the served model is gone ({str(error).splitlines()[0]})")


if __name__ == "__main__":
    main(*sys.argv[1:])
