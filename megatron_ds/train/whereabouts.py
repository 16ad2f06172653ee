"""Where a rank is: what it is doing, and the innermost lines of its main thread.

Watching threads read it, of a rank whose main thread may hang; it is told to the others through the rendezvous store.
"""

from __future__ import annotations

import linecache
import os
import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import torch
import torch.distributed as dist

_WAITS = re.compile(r"\b(wait|barrier|synchronize|tolist|item|poll|select)\(")
_TORCH = os.path.dirname(torch.__file__) + os.sep
_TORCH_DISTRIBUTED = os.path.dirname(dist.__file__) + os.sep  # makes process groups through the store, in C

Line = tuple[CodeType, int]


@dataclass(frozen=True)
class Whereabouts:
    """Where a rank is. ``waits``: for other ranks, as far as the line it stands in tells; ``seconds``: how long."""

    text: str = ""
    waits: bool = False
    seconds: int = 0


def main_thread() -> list[Line]:
    """The lines in which the main thread stands now, the innermost first."""
    lines = []
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        lines.append((frame.f_code, frame.f_lineno or 0))  # None between two lines
        frame = frame.f_back
    return lines


def waits_in(lines: Sequence[Line]) -> bool:
    """Whether the innermost line is one in which a rank waits for others."""
    if not lines:
        return False
    (code, number), *_ = lines
    source = linecache.getline(code.co_filename, number)
    return code.co_filename.startswith(_TORCH_DISTRIBUTED) or _WAITS.search(source) is not None


def innermost(lines: Sequence[Line]) -> str:
    """The innermost line and the next two outside of torch."""
    outside = [line for line in lines[1:] if not line[0].co_filename.startswith(_TORCH)]
    shown = []
    for code, number in [*lines[:1], *outside[:2]]:
        path = Path(code.co_filename)
        shown.append(f"{path.parent.name}/{path.name}:{number} {code.co_name}")
    return " < ".join(shown)


def notes_of(ranks: Sequence[int], store: dist.Store) -> dict[int, bytes]:
    """What these ranks have left in the store about themselves, of those that have."""
    return {rank: store.get(note_of(rank)) for rank in ranks if store.check([note_of(rank)])}


def note_of(rank: int) -> str:
    """The store's key of a rank's note."""
    return f"where/{rank}"
