"""Flat buffers that the ranks of one host read from each other; see ``comm/buffers.py`` for what each method does."""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

import torch

from megatron_ds.comm.local.arena import SharedArena
from megatron_ds.comm.local.tokens import Tokens
from megatron_ds.comm.pending import Pending, slice_dim0
from megatron_ds.mesh import Axis

if TYPE_CHECKING:
    from megatron_ds.comm.buffers import BufferSizes

_CHUNK = 1 << 16
"""Elements added at a time where there are several peers, so that the sum stays in the cache between them."""
_PAGE = 1024
"""Elements of a page at least: slots begin on one."""


class LocalBuffers:
    """Buffers in an arena that all ranks of the axis map."""

    def __init__(self, arena: SharedArena):
        self.axis, self.device, self._arena = arena.axis, torch.device("cpu"), arena

    @staticmethod
    def create(axis: Axis, sizes: BufferSizes) -> LocalBuffers | None:
        wanted, used = list(sizes.whole), SharedArena.bytes_for(sizes.whole)
        for number, size, dtype in sizes.slots:
            slots = [(_stride(size), dtype)] * number
            at_once = sizes.window / (size * dtype.itemsize) + 2
            used += SharedArena.bytes_for(slots[: math.ceil(at_once)])
            wanted += slots
        common = SharedArena.bytes_for(sizes.gathered)
        arena = SharedArena.create(SharedArena.bytes_for(wanted), axis, used=used, common=common)
        return None if arena is None else LocalBuffers(arena)

    def whole(self, size: int, dtype: torch.dtype) -> LocalWhole:
        return LocalWhole(self._arena, size, dtype)

    def slots(self, number: int, size: int, dtype: torch.dtype) -> LocalSlots:
        return LocalSlots(self._arena, number, size, dtype)

    def gathered(self, size: int, dtype: torch.dtype) -> LocalGathered:
        return LocalGathered(self._arena, size, dtype)

    def gather_exactly(self, on: bool) -> None:
        pass

    def publish(self) -> None:
        self._arena.publish()

    def meet(self) -> None:
        self._arena.tokens().wait()


class LocalWhole:
    """A buffer of which ``by_rank`` are all ranks' copies.

    A rank's copy is read by its peers until they have done their ``wait()``. Whoever writes it again must know that
    they have: from any tokens that they sent afterwards. A reduction sends tokens that its buffer is complete; the
    ``wait()`` of a gather waits until every peer has published its slice.
    """

    def __init__(self, arena: SharedArena, size: int, dtype: torch.dtype):
        self._arena, self._axis = arena, arena.axis
        self._by_rank = arena.take(size, dtype)
        self.whole = self._by_rank[self._axis.rank]
        self._shard = slice_dim0(self.whole, self._axis)

    def reduce_scatter_start(self, key: int = 0) -> Pending:
        tokens = self._arena.tokens()

        def add_up() -> None:
            tokens.wait()
            _add_peers(self._shard, [slice_dim0(self._by_rank[peer], self._axis) for peer in self._axis.peers])

        return Pending(self._shard, then=add_up)

    def all_gather_start(self) -> Pending:
        def copy() -> None:
            self._arena.wait_published()
            size = self._shard.numel()
            for peer in self._axis.peers:
                part = slice(peer * size, (peer + 1) * size)
                self.whole[part].copy_(self._by_rank[peer][part])

        return Pending(self.whole, then=copy)


class LocalSlots:
    """As many slots as there are buffers; only those ever written take memory, and the lowest free one is taken first.

    Which slot a buffer gets is each rank's own affair: it tells its peers.
    """

    def __init__(self, arena: SharedArena, number: int, size: int, dtype: torch.dtype):
        self.arena, self.dtype, self.device = arena, dtype, torch.device("cpu")
        self._stride = _stride(size)
        self._free = list(range(number))
        self._by_rank = arena.take(number * self._stride, dtype)

    def take(self, size: int) -> LocalSlot:
        return LocalSlot(self, heapq.heappop(self._free), size)

    def of_rank(self, rank: int, number: int, size: int) -> torch.Tensor:
        """``[size]`` elements of any rank's slot of this number."""
        return self._by_rank[rank].narrow(0, number * self._stride, size)

    def give_back(self, number: int) -> None:
        heapq.heappush(self._free, number)


class LocalSlot:
    def __init__(self, slots: LocalSlots, number: int, size: int):
        self._slots, self._number = slots, number
        self.whole = slots.of_rank(slots.arena.axis.rank, number, size)
        self._read: Tokens | None = None

    def reduce_scatter_start(self, shard: torch.Tensor, add: bool, key: int = 0) -> Pending:
        arena, axis = self._slots.arena, self._slots.arena.axis
        own = slice_dim0(self.whole, axis)
        tokens = arena.tokens(self._number)

        def add_up() -> None:
            numbers, size = tokens.wait(), self.whole.numel()
            theirs = [slice_dim0(self._slots.of_rank(peer, numbers[peer], size), axis) for peer in axis.peers]
            if len(theirs) == 1 and not add:  # in one pass
                torch.add(own, theirs[0], out=shard)
            else:
                _add_peers(own, theirs)
                shard.add_(own) if add else shard.copy_(own)
            self._read = arena.tokens()

        return Pending(shard, then=add_up)

    def free(self) -> None:
        if self._read is not None:
            self._read.wait()
        self._slots.give_back(self._number)


class LocalGathered:
    """The shards of all ranks lie in a row, and ``whole`` is this rank's private view of them.

    So nothing is copied: a gather waits until every peer has published its shard. What is written into ``whole`` stays
    in this rank's view, freed or not, until :meth:`write_back`, when no peer reads the shards.
    """

    is_collective = False

    def __init__(self, arena: SharedArena, size: int, dtype: torch.dtype):
        self._arena = arena
        shards, self._view = arena.take_common(size, dtype)
        self.whole: torch.Tensor = self._view.tensor
        self._shard = slice_dim0(shards, arena.axis)
        self.shard: torch.Tensor | None = self._shard
        self.is_whole = size == 0
        self.is_gathered = False
        self._written = False  # this rank's view is, and the shard is not yet

    def take(self) -> None:
        self.is_whole = True

    def all_gather_start(self, shard: torch.Tensor) -> Pending:
        self.take()

        def look() -> None:
            self._arena.wait_published()
            self.is_gathered = True

        return Pending(self.whole, then=look)

    def serve(self, shard: torch.Tensor) -> None:
        """Nothing: a gather is each rank's own affair."""

    def write_back(self) -> None:
        if self._written or (self.is_gathered and self._view.written()):
            self._shard.copy_(slice_dim0(self.whole, self._arena.axis))
            self._written = True

    def free(self) -> None:
        self._written = self._written or self._view.written()
        if self._written:
            self.is_whole = self.is_gathered = False
        else:
            self.discard()

    def discard(self) -> None:
        self._view.forget()
        self.is_whole, self.is_gathered, self._written = self.whole.numel() == 0, False, False


def _stride(size: int) -> int:
    """Elements from slot to slot: whole pages."""
    return -(-size // _PAGE) * _PAGE


def _add_peers(own: torch.Tensor, theirs: list[torch.Tensor]) -> None:
    """Add in the order in which the process group's exchange does: the same bits on one host and on several."""
    step = own.numel() if len(theirs) == 1 else _CHUNK
    for start in range(0, own.numel(), max(step, 1)):
        mine = own[start : start + step]
        for other in theirs:
            mine.add_(other[start : start + step])
