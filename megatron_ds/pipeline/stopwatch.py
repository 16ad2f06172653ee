"""Times the actions of a pipeline schedule as they run, for the timeline of a recorded step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_ds.pipeline.action import Action
from megatron_ds.pipeline.timeline import Event


@contextmanager
def timed(events: list[Event], rank: int, action: Action, device: torch.device) -> Iterator[None]:
    """Add the interval of what runs inside to ``events``, the work that it queued on the device included."""
    _synchronize(device)
    start = time.perf_counter()
    yield
    _synchronize(device)
    events.append(Event(rank, action, start, time.perf_counter()))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
