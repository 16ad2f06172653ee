"""A rank that the first one of a served model has started (``python -m megatron_ds.inference.follower``)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_ds.inference.llm import LLM


def main(rank: str, port: str, settings: str) -> None:
    values = json.loads(settings)
    LLM(Path(values.pop("model")), **values, place=(int(rank), int(port))).follow()


if __name__ == "__main__":
    main(*sys.argv[1:])
