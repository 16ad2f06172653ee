"""What the C library's allocator does with the memory of freed CPU tensors. It changes the whole process."""

from __future__ import annotations

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones.

    By default every large temporary is mapped and unmapped anew: 100,000 page faults a step of a small model on a CPU,
    6% of the CPU time in fp32 and 11% in bf16. Where the C library is another one, nothing happens.
    """
    mmap_threshold, trim_threshold, arena_max = -3, -1, -8  # from malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
        libc.mallopt(arena_max, 1)


def give_back_freed_memory() -> None:
    """After a first step: what building the model has freed, and what lies between the step's tensors.

    The steps that follow settle in less: 10 MiB of 700 in bf16 and 25 of 815 in fp32, two ranks at stage 2.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
