"""Print to a standard output that may be full or closed."""

from __future__ import annotations

import contextlib
import os
import sys


def print_line(text: str) -> None:
    """Print a line at once. Where standard output is full or closed that is said, once, and no reason to end a run."""
    try:
        print(text, flush=True)
    except OSError as error:
        _silence()
        with contextlib.suppress(OSError):
            print(f"standard output is lost, and not needed: {error.strerror}", file=sys.stderr, flush=True)


def _silence() -> None:
    """From now on what is printed goes nowhere, the interpreter's own flush at its end included."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
