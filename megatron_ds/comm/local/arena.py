"""Memory that the ranks of one host read from each other directly, instead of through a socket.

What one CPU rank sends to another is copied into the kernel and out again, with CPU time that is taken from the cores
that compute. Where all ranks of an axis run on one Linux host their flat buffers lie in an arena that every rank of the
axis maps, and a reduction is one read of the neighbour's memory.

Data goes through the arena, *order* goes through pipes (see ``tokens.py``): a rank that has finished writing sends a
token, and a rank that has received it may read. So there is no spinning and no atomic.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ds.comm.local.tokens import PipeOffer, TokenPipes, Tokens
from megatron_ds.host import free_host_memory
from megatron_ds.mesh import Axis

_PAGE = 4096
_PAGE_STATE = slice(7 if sys.byteorder == "little" else 0, None, 8)
"""Of a page's eight bytes in ``pagemap``, the one that says, from the left: present, swapped out, of a file."""
_NOT_WRITTEN = bytes(state for state in range(256) if not state & 0xC0 or state & 0x20)
"""That byte of a page which was not written: the page is absent, or it still is the file's, as after a read."""


class SharedArena:
    """Memory of every rank of ``axis`` that all of them map; tensors are taken from it one after the other.

    All ranks must take the same sizes in the same order. The memory is freed with the last tensor that lies in it,
    and leaves no file behind, however the process ends.
    """

    def __init__(self, axis: Axis, blocks: Sequence[mmap.mmap], pipes: TokenPipes, descriptor: int, kept: int):
        self.axis = axis
        self._blocks = blocks
        self._pipes = pipes
        self._kept = kept  # bytes at the end of the first rank's block that belong to all
        self._used = self._common_used = 0
        self._descriptor = descriptor  # of the first rank's block
        self._published: Tokens | None = None

    @staticmethod
    def create(nbytes: int, axis: Axis, used: int | None = None, common: int = 0) -> SharedArena | None:
        """Collective over ``axis``. None, on all ranks alike, where the ranks cannot map each other's memory.

        ``used``: bytes that will be written at one time, where that is fewer: pages that nobody writes cost nothing.
        ``common``: bytes besides, which are there once for all ranks.

        That is so for an axis of one rank, for a group that is not gloo, on other systems than Linux, between hosts or
        containers, and where the host is short of memory for it.
        """
        if axis.group is None or dist.get_backend(axis.group) != "gloo" or not hasattr(os, "memfd_create"):
            return None
        nbytes, common = _pages(max(nbytes, 1)), _pages(common)
        sizes = [nbytes + common if rank == 0 else nbytes for rank in range(axis.size)]
        offer, opened = PipeOffer(axis), contextlib.ExitStack()
        with contextlib.closing(offer), opened:
            nonce = secrets.randbits(62)
            needed = axis.size * min(nbytes, nbytes if used is None else used) + common
            descriptor, blocks = _offer(sizes[axis.rank], nonce, needed, opened) if offer.complete else (0, [])
            offers = _exchange([os.getpid(), descriptor, nonce, int(bool(blocks)), *offer.descriptors], axis)
            fine = all(theirs[3] for theirs in offers)
            if fine:
                descriptors, blocks = _accept(offers, axis.rank, blocks[0], sizes, opened)
                fine = len(blocks) == axis.size and offer.open([o[0] for o in offers], [o[4:] for o in offers])
            # Everybody must come to the same verdict; afterwards nobody reads the nonce again.
            if not all(verdict[0] for verdict in _exchange([int(fine)], axis)):
                return None
            blocks[axis.rank][:8] = bytes(8)
            arena = SharedArena(axis, blocks, offer.accept(), descriptors[0], common)
            weakref.finalize(arena, opened.pop_all().close)
        arena.tokens().wait()
        return arena

    def tokens(self, number: int = 0) -> Tokens:
        """Send a token to all peers; all ranks do so in the same order."""
        return self._pipes.send(number)

    def publish(self) -> None:
        """Signals that this rank has finished writing; all ranks do so in the same order as they send tokens."""
        self._published = self.tokens()

    def wait_published(self) -> None:
        """Wait until every peer has published what this rank has published last. Before its memory is read."""
        if self._published is not None:
            self._published.wait()

    def take(self, numel: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """``numel`` zeros on every rank: the tensors of all ranks of the axis, by rank in it; one's own among them."""
        start, nbytes = self._used, numel * dtype.itemsize
        self._used += _pages(nbytes)
        size = len(self._blocks[0]) - self._kept
        if self._used > size:
            raise ValueError(f"the arena has {size} bytes, {self._used} were asked for")
        if numel == 0:
            return [torch.empty(0, dtype=dtype) for _ in self._blocks]
        return [torch.frombuffer(block, dtype=dtype, count=numel, offset=start) for block in self._blocks]

    def take_common(self, numel: int, dtype: torch.dtype) -> tuple[torch.Tensor, PrivateView]:
        """``numel`` zeros that are there once for all ranks, and a view of them that a rank may write without others
        seeing it."""
        start, nbytes = len(self._blocks[0]) - self._kept + self._common_used, numel * dtype.itemsize
        self._common_used += _pages(nbytes)
        if self._common_used > self._kept:
            raise ValueError(f"the arena has {self._kept} common bytes, {self._common_used} were asked for")
        if numel == 0:
            return torch.empty(0, dtype=dtype), PrivateView(None, torch.empty(0, dtype=dtype))
        shared = torch.frombuffer(self._blocks[0], dtype=dtype, count=numel, offset=start)
        access = {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
        pages = mmap.mmap(self._descriptor, nbytes, offset=start, **access)
        return shared, PrivateView(pages, torch.frombuffer(pages, dtype=dtype, count=numel))

    @staticmethod
    def bytes_for(tensors: Sequence[tuple[int, torch.dtype]]) -> int:
        """Size of an arena from which these can be taken."""
        return sum(_pages(numel * dtype.itemsize) for numel, dtype in tensors)


@dataclass(frozen=True)
class PrivateView:
    """``tensor`` shows common memory, until this rank writes it: then it has that page to itself.

    Nothing is copied, and only pages that are looked at count as this process's memory.
    """

    pages: mmap.mmap | None
    tensor: torch.Tensor

    def written(self) -> bool:
        """Whether this rank has written the view since it last forgot: then it has pages of its own.

        The kernel tells (``pagemap``, see proc(5)), page by page; where it does not, the answer is yes.
        """
        if self.pages is None:
            return False
        first, count = self.tensor.data_ptr() // mmap.PAGESIZE, -(-len(self.pages) // mmap.PAGESIZE)
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as file:
                entries = os.pread(file.fileno(), 8 * count, 8 * first)
        except OSError:
            return True
        return len(entries) < 8 * count or bool(entries[_PAGE_STATE].translate(None, _NOT_WRITTEN))

    def forget(self) -> None:
        """Drop what was written, and the pages: the next look shows the common memory again."""
        if self.pages is not None:
            self.pages.madvise(mmap.MADV_DONTNEED)


def _pages(nbytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-nbytes // _PAGE) * _PAGE


def _offer(nbytes: int, nonce: int, needed: int, opened: contextlib.ExitStack) -> tuple[int, list[mmap.mmap]]:
    """The descriptor of this rank's block and the block, with the nonce in its first bytes; no block where the host
    lacks the memory that all ranks need."""
    # Asked beforehand: this memory has no limit of its own, and reserving more than there is calls the OOM killer.
    if needed > free_host_memory():
        return 0, []
    try:
        descriptor = os.memfd_create("megatron-ds")
        opened.callback(os.close, descriptor)
        os.ftruncate(descriptor, nbytes)
        block = mmap.mmap(descriptor, nbytes)
    except OSError:
        return 0, []
    block[:8] = nonce.to_bytes(8, "little")
    return descriptor, [block]


def _accept(
    offers: Sequence[Sequence[int]], rank: int, own: mmap.mmap, sizes: Sequence[int], opened: contextlib.ExitStack
) -> tuple[list[int], list[mmap.mmap]]:
    """Every rank's descriptor and block, or fewer where one cannot be mapped. The nonce tells a peer from a stranger's
    process id."""
    descriptors, blocks = [], []
    for peer, (process, descriptor, nonce, *_) in enumerate(offers):
        if peer == rank:
            descriptors.append(descriptor)
            blocks.append(own)
            continue
        try:
            descriptors.append(os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR))
            opened.callback(os.close, descriptors[-1])
            block = mmap.mmap(descriptors[-1], sizes[peer])
        except (OSError, ValueError):
            break
        if block[:8] != nonce.to_bytes(8, "little"):
            break
        blocks.append(block)
    return descriptors, blocks


def _exchange(values: list[int], axis: Axis) -> list[list[int]]:
    """Every rank's integers."""
    mine = torch.tensor(values, dtype=torch.int64)
    everyone = [torch.empty_like(mine) for _ in range(axis.size)]
    dist.all_gather(everyone, mine, group=axis.group)
    return [tensor.tolist() for tensor in everyone]
