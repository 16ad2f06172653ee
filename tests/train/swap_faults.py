"""What happens to the swap files of the ranks of test_swap_in_runs.py: each is called in a rank before it trains.

Some take what they need first (``functools.partial``) and the rank last.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planted_faults import at_step
from small_disk import fill, take_away

_PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


def is_swap_file(fd: int) -> bool:
    """Of all files that are read and written here, only those have no name, or one that says what they are."""
    name = os.readlink(f"/proc/self/fd/{fd}")
    return name.endswith("(deleted)") or "megatron-ds-swap" in name


def in_transfer(name: str, step: int, number: int, action: Callable[..., Any]) -> None:
    """In place of call ``number`` of ``os.<name>`` on a swap file, counted from ``step`` on, do ``action``.

    It is called with the real function, the descriptor, the data and the offset.
    """
    real: Callable[..., Any] = getattr(os, name)
    lock, calls, armed = threading.Lock(), iter(range(1 << 30)), threading.Event()

    def call(fd: int, data: Any, offset: int) -> Any:
        if armed.is_set() and is_swap_file(fd):
            with lock:
                now = next(calls)
            if now == number:
                return action(real, fd, data, offset)
        return real(fd, data, offset)

    setattr(os, name, call)
    at_step(step, armed.set)


def _half(data: Any) -> Any:
    """The first half of what is to be transferred, in whole blocks where there are several."""
    if isinstance(data, list):
        return [_half(data[0])]
    return data[: len(data) // 2 // 4096 * 4096] if len(data) >= 8192 else data


def killed_in_transfer(name: str, number: int, rank: int) -> None:
    """Rank 1 dies in the middle of a transfer, of which half has been done; other threads are at theirs."""

    def die(real: Callable[..., Any], fd: int, data: Any, offset: int) -> None:
        real(fd, _half(data), offset)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        in_transfer(name, 3, number, die)


def disk_is_full(folder: str, rank: int) -> None:
    """A write of rank 1 needs new blocks, as on a disk that copies on write or cannot reserve, and none are left."""

    def write(real: Callable[..., Any], fd: int, data: Any, offset: int) -> Any:
        punch = ctypes.c_longlong(offset), ctypes.c_longlong(len(data))
        assert ctypes.CDLL(None).fallocate(fd, _PUNCH_HOLE, *punch) == 0
        fill(Path(folder))
        return real(fd, data, offset)

    if rank == 1:
        in_transfer("pwrite", 3, 2, write)


def byte_is_flipped(rank: int) -> None:
    """One byte of what rank 1 has written comes to the disk wrong."""

    def write(real: Callable[..., Any], fd: int, data: Any, offset: int) -> Any:
        written = real(fd, data, offset)
        with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as file:
            byte = os.pread(file.fileno(), 1, offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)
        return written

    if rank == 1:
        in_transfer("pwrite", 3, 2, write)


def disk_is_taken_away(folder: str, rank: int) -> None:
    if rank == 1:
        at_step(3, lambda: take_away(Path(folder)))
