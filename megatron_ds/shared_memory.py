"""Memory that the ranks of one host read from each other directly, instead of through a socket.

Sending 55 MB from one CPU rank to another copies it into the kernel and out again on both sides: about 30 ms of CPU
time a rank, taken from the cores that compute. Where all ranks of an axis run on one Linux host their flat buffers lie
in an arena that every rank of the axis maps, and a reduction is one read of the neighbour's memory.

Data goes through the arena, *order* goes through the process group: a rank that has finished writing sends an empty
token, and a rank that has received it may read. So there is no spinning and no atomic, a dead rank is noticed as in
any other transfer, and the socket gives the memory ordering that every architecture needs.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_ds.mesh import Axis

_PAGE = 4096
_TAG = 1  # tokens keep out of the way of other transfers between the same ranks


class Tokens:
    """Tokens under way to and from every other rank of an axis; :meth:`wait` returns when all peers sent theirs.

    A token may carry a small number: :meth:`wait` gives every rank's, by rank in the axis.
    """

    def __init__(self, axis: Axis, number: int = 0):
        peers = [(axis.rank + step) % axis.size for step in range(1, axis.size)]
        self._numbers = torch.full((axis.size,), number, dtype=torch.int64)
        sent = self._sent = torch.tensor([number], dtype=torch.int64)  # kept until the transfers are done
        places = self._numbers.split(1)
        self._work = [dist.irecv(places[peer], group=axis.group, group_src=peer, tag=_TAG) for peer in peers]
        self._work += [dist.isend(sent, group=axis.group, group_dst=peer, tag=_TAG) for peer in peers]

    def wait(self) -> list[int]:
        for work in self._work:
            if work is not None:
                work.wait()
        self._work = []
        return self._numbers.tolist()


class SharedArena:
    """One block of memory a rank, mapped by all ranks of ``axis``; tensors are taken from it one after the other.

    All ranks must take the same sizes in the same order. The memory is freed with the last tensor that lies in it,
    and leaves no file behind, however the process ends.
    """

    def __init__(self, axis: Axis, blocks: Sequence[mmap.mmap]):
        self.axis = axis
        self._blocks = blocks
        self._used = 0

    @staticmethod
    def create(nbytes: int, axis: Axis, used: int | None = None) -> SharedArena | None:
        """Collective over ``axis``. None, on all ranks alike, where the ranks cannot map each other's memory.

        ``used``: bytes that will be written at one time, where that is fewer: pages that nobody writes cost nothing.
        That is so for an axis of one rank, for a group that is not gloo, on other systems than Linux, between hosts or
        containers, and where the host is short of memory for it.
        """
        if axis.group is None or dist.get_backend(axis.group) != "gloo" or not hasattr(os, "memfd_create"):
            return None
        nbytes = -(-max(nbytes, 1) // _PAGE) * _PAGE
        descriptor = os.memfd_create("megatron-ds")
        opened: list[int] = []
        try:
            nonce = secrets.randbits(62)
            blocks = _offer(descriptor, nbytes, nonce, axis.size * min(nbytes, nbytes if used is None else used))
            offers = _exchange([os.getpid(), descriptor, nonce, int(bool(blocks))], axis)
            fine = all(offer[3] for offer in offers)
            if fine:
                blocks = _accept(offers, axis.rank, blocks[0], nbytes, opened)
            # Everybody must come to the same verdict; afterwards nobody reads the nonce again.
            if not all(verdict[0] for verdict in _exchange([int(fine and len(blocks) == axis.size)], axis)):
                return None
            blocks[axis.rank][:8] = bytes(8)
        finally:
            for number in (descriptor, *opened):
                os.close(number)
        Tokens(axis).wait()
        return SharedArena(axis, blocks)

    def take(self, numel: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """``numel`` zeros on every rank: the tensors of all ranks of the axis, by rank in it; one's own among them."""
        start, nbytes = self._used, numel * dtype.itemsize
        self._used += -(-nbytes // _PAGE) * _PAGE
        if self._used > len(self._blocks[0]):
            raise ValueError(f"the arena has {len(self._blocks[0])} bytes, {self._used} were asked for")
        if numel == 0:
            return [torch.empty(0, dtype=dtype) for _ in self._blocks]
        return [torch.frombuffer(block, dtype=dtype, count=numel, offset=start) for block in self._blocks]

    @staticmethod
    def bytes_for(tensors: Sequence[tuple[int, torch.dtype]]) -> int:
        """Size of an arena from which these can be taken."""
        return sum(-(-numel * dtype.itemsize // _PAGE) * _PAGE for numel, dtype in tensors)


def _offer(descriptor: int, nbytes: int, nonce: int, needed: int) -> list[mmap.mmap]:
    """This rank's block with the nonce in its first bytes; empty where the host lacks the memory all ranks need."""
    # Asked beforehand: this memory has no limit of its own, and reserving more than there is calls the OOM killer.
    if needed > _available_bytes():
        return []
    try:
        os.ftruncate(descriptor, nbytes)
        block = mmap.mmap(descriptor, nbytes)
    except OSError:
        return []
    block[:8] = nonce.to_bytes(8, "little")
    return [block]


def _available_bytes() -> int:
    """Memory that the host could give to processes now, without swapping."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def _accept(
    offers: Sequence[Sequence[int]], rank: int, own: mmap.mmap, nbytes: int, opened: list[int]
) -> list[mmap.mmap]:
    """Every rank's block, or fewer where one cannot be mapped. The nonce tells a peer from a stranger's process id."""
    blocks = []
    for peer, (process, descriptor, nonce, _) in enumerate(offers):
        if peer == rank:
            blocks.append(own)
            continue
        try:
            opened.append(os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR))
            block = mmap.mmap(opened[-1], nbytes)
        except (OSError, ValueError):
            return []
        if block[:8] != nonce.to_bytes(8, "little"):
            return []
        blocks.append(block)
    return blocks


def _exchange(values: list[int], axis: Axis) -> list[list[int]]:
    """Every rank's integers."""
    mine = torch.tensor(values, dtype=torch.int64)
    everyone = [torch.empty_like(mine) for _ in range(axis.size)]
    dist.all_gather(everyone, mine, group=axis.group)
    return [tensor.tolist() for tensor in everyone]
