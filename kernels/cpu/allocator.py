"""What the C library's allocator does with the memory of freed CPU tensors, of the whole process, and huge pages."""

from __future__ import annotations

import contextlib
import ctypes

_HUGE_PAGE = 1 << 21
_HUGE_PAGE_GAINS = 1 << 18
"""Bytes from which on it is worth the call."""


def map_large_tensors() -> None:
    """Have glibc map every large tensor apart from its heap (``M_MMAP_THRESHOLD``), and unmap it once it is freed.

    Until a first step is over, as that leaves small blocks behind: modules that it imports, kernels that oneDNN
    compiles. In the room between large tensors they would keep the heap in pieces, into which those of later steps do
    not fit. glibc by itself raises the threshold as tensors are freed. Where the C library is another one, nothing
    happens.
    """
    _set_options(1 << 17)


def keep_freed_memory() -> None:
    """Have glibc keep in its heap the memory of tensors that are freed from now on, for the next ones.

    Otherwise every large temporary is mapped and unmapped anew, with a fault for each of its pages. What is free
    already goes back to the system.
    """
    _set_options(1 << 30)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _set_options(mapped_from: int) -> None:
    """Blocks of ``mapped_from`` bytes and more are mapped; the heap, one for all threads, keeps what is freed."""
    mmap_threshold, trim_threshold, arena_max = -3, -1, -8  # from malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, mapped_from)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
        libc.mallopt(arena_max, 1)


def use_huge_pages(address: int, count: int) -> int:
    """Move ``count`` bytes from ``address`` on to transparent huge pages of 2 MiB now, and what shares these with them.

    For weights that are read once a step: no cache of the processor keeps where so many pages of 4 KiB are, least of
    all in a virtual machine, whose pages are looked up twice.

    Returns:
        How many such pages they are on now; at the ends of a mapping they stay on small ones.
    """
    if count < _HUGE_PAGE_GAINS:
        return 0
    advise, collapse = 14, 25  # from mman.h; before Linux 6.1 the second is refused
    moved = 0
    with contextlib.suppress(OSError, AttributeError):
        madvise = ctypes.CDLL("libc.so.6").madvise
        for page in range(address // _HUGE_PAGE * _HUGE_PAGE, address + count, _HUGE_PAGE):
            where = ctypes.c_void_p(page), ctypes.c_size_t(_HUGE_PAGE)
            madvise(*where, advise)
            moved += madvise(*where, collapse) == 0
    return moved
