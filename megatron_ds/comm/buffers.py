"""Flat buffers of which each rank of an axis owns a slice: reduce-scattered and all-gathered where they lie.

An owner of such buffers (ZeRO) takes them all at the start, from :func:`open_buffers`. There are three kinds, by when
the whole buffer has memory: always (:class:`WholeMemory`), while one round of gradients is summed (:class:`Slots`),
while somebody reads the gathered values (:class:`GatheredMemory`). Here is the way through the process group; ranks of
one host read each other's memory instead (``local/shared_buffers.py``), and nothing is sent at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from megatron_ds.comm import local
from megatron_ds.comm.collectives import all_gather_start, reduce_scatter_start
from megatron_ds.comm.pending import Pending, slice_dim0
from megatron_ds.mesh import Axis


@dataclass
class BufferSizes:
    """What will be taken, by kind: elements and dtype of each buffer; of slots how many besides.

    Attributes:
        window: bytes of slots that are in use at one time, besides two more.
    """

    whole: list[tuple[int, torch.dtype]] = field(default_factory=list)
    gathered: list[tuple[int, torch.dtype]] = field(default_factory=list)
    slots: list[tuple[int, int, torch.dtype]] = field(default_factory=list)
    window: float = 0.0


class WholeMemory(Protocol):
    """``whole``: ``[size]``, zeros at first, there all the time."""

    whole: torch.Tensor

    def reduce_scatter_start(self, key: int = 0) -> Pending:
        """Sum over the axis in place: afterwards this rank's slice is the sum, the rest is void.

        ``key``: the seed of the random numbers, where what is sent is rounded by chance.
        """

    def all_gather_start(self) -> Pending:
        """Collect every rank's slice in place, once all peers have published theirs."""


class Slot(Protocol):
    """Memory for one whole buffer, for one round."""

    whole: torch.Tensor

    def reduce_scatter_start(self, shard: torch.Tensor, add: bool, key: int = 0) -> Pending:
        """Sum this rank's slice over the axis into ``shard``, or ``add`` it to what is there.

        ``key``: as of :meth:`WholeMemory.reduce_scatter_start`.
        """

    def free(self) -> None:
        """Give the memory back once every peer has read it. All ranks of the axis, in one order."""


class Slots(Protocol):
    """Memory for a few whole buffers at a time, all of one dtype: slots that go from one to the next."""

    dtype: torch.dtype
    device: torch.device

    def take(self, size: int) -> Slot:
        """One with ``[size]`` elements, uninitialised."""


class GatheredMemory(Protocol):
    """``whole`` is one tensor all the time, with memory from :meth:`take` to :meth:`free`.

    So everything that autograd saved of it, transposed views included, is good again once it has been gathered again.

    Attributes:
        shard: this rank's slice, which stays; None where it lies elsewhere.
        is_whole: whether ``whole`` has its memory.
        is_gathered: whether ``whole`` has the values.
        is_collective: whether a gather takes all ranks of the axis at the same time.
    """

    whole: torch.Tensor
    shard: torch.Tensor | None
    is_whole: bool
    is_gathered: bool
    is_collective: bool

    def take(self) -> None:
        """Memory for ``whole``, uninitialised."""

    def all_gather_start(self, shard: torch.Tensor) -> Pending:
        """Take the memory and collect every rank's ``shard`` in it."""

    def serve(self, shard: torch.Tensor) -> None:
        """Take part in a gather that peers need, where it takes all ranks, and leave ``whole`` as it is."""

    def write_back(self) -> None:
        """``shard``, if it is here, becomes what was written into ``whole``. No peer may be reading."""

    def free(self) -> None:
        """Give the memory back; what was written into it stays, at the latest until the next :meth:`write_back`."""

    def discard(self) -> None:
        """Give the memory back, and what was written into it."""


class Buffers(Protocol):
    """The buffers of one axis. All ranks take the same ones in the same order."""

    axis: Axis
    device: torch.device

    def whole(self, size: int, dtype: torch.dtype) -> WholeMemory: ...

    def slots(self, number: int, size: int, dtype: torch.dtype) -> Slots:
        """``number`` of them may be in use, of ``size`` elements at most."""

    def gathered(self, size: int, dtype: torch.dtype) -> GatheredMemory:
        """With a shard of zeros."""

    def gather_exactly(self, on: bool) -> None:
        """While it is on, gathered values are those of the shards, bit for bit, however they are sent. Collective."""

    def publish(self) -> None:
        """Signals that this rank has changed its slices; gathers of its peers read them from now on."""

    def meet(self) -> None:
        """Wait until every peer is here, and so reads nothing of this rank: before it writes what peers read."""


def open_buffers(axis: Axis, device: torch.device, sizes: BufferSizes) -> Buffers:
    """Collective over ``axis``: buffers that its ranks read from each other where they can, else the group's."""
    return local.open_buffers(axis, device, sizes) or GroupBuffers(axis, device)


class ExactGathers(Protocol):
    def gather_exactly(self, on: bool) -> None:
        """See :class:`Buffers`."""


@contextmanager
def exact_gathers(every: Sequence[ExactGathers]) -> Iterator[None]:
    """Inside, gathered values are those of the shards, however they are sent elsewhere. Collective."""
    for buffers in every:
        buffers.gather_exactly(True)
    try:
        yield
    finally:
        for buffers in every:
            buffers.gather_exactly(False)


class GroupBuffers:
    """Buffers in this rank's own memory. Peers see what is sent, so there is nothing to publish or to wait for."""

    def __init__(self, axis: Axis, device: torch.device):
        self.axis, self.device = axis, device

    def whole(self, size: int, dtype: torch.dtype) -> WholeMemory:
        return _Whole(torch.zeros(size, dtype=dtype, device=self.device), self)

    def slots(self, number: int, size: int, dtype: torch.dtype) -> Slots:
        return _Slots(dtype, self)

    def gathered(self, size: int, dtype: torch.dtype) -> GatheredMemory:
        shard = torch.zeros(size // self.axis.size, dtype=dtype, device=self.device)
        return GroupGathered(size, dtype, self.device, self.axis, shard)

    def sum_start(self, output: torch.Tensor, whole: torch.Tensor, add: bool, key: int) -> Pending:
        """Sum this rank's slice of ``whole`` over the axis into ``output`` (or ``add`` it), which may be that slice.

        ``key``: as of :meth:`WholeMemory.reduce_scatter_start`.
        """
        own = slice_dim0(whole, self.axis)
        summing = reduce_scatter_start(own, whole, self.axis)
        if output.data_ptr() == own.data_ptr():
            return summing
        return Pending(output, then=lambda: output.add_(summing.wait()) if add else output.copy_(summing.wait()))

    def gather_exactly(self, on: bool) -> None:
        pass

    def publish(self) -> None:
        pass

    def meet(self) -> None:
        pass


class _Whole:
    def __init__(self, whole: torch.Tensor, buffers: GroupBuffers):
        self.whole, self._buffers = whole, buffers
        self._shard = slice_dim0(whole, buffers.axis)

    def reduce_scatter_start(self, key: int = 0) -> Pending:
        return self._buffers.sum_start(self._shard, self.whole, False, key)

    def all_gather_start(self) -> Pending:
        return all_gather_start(self.whole, self._shard, self._buffers.axis)


class _Slots:
    def __init__(self, dtype: torch.dtype, buffers: GroupBuffers):
        self.dtype, self.device, self._buffers = dtype, buffers.device, buffers

    def take(self, size: int) -> Slot:
        return _Slot(torch.empty(size, dtype=self.dtype, device=self.device), self._buffers)


class _Slot:
    def __init__(self, whole: torch.Tensor, buffers: GroupBuffers):
        self.whole, self._buffers = whole, buffers

    def reduce_scatter_start(self, shard: torch.Tensor, add: bool, key: int = 0) -> Pending:
        return self._buffers.sum_start(shard, self.whole, add, key)

    def free(self) -> None:
        pass


class GroupGathered:
    """Gathered from where each rank's shard lies; see :class:`GatheredMemory`."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, axis: Axis, shard: torch.Tensor | None):
        self._axis = axis
        self.whole = torch.empty(0, dtype=dtype, device=device)
        self.whole.set_(self.whole.untyped_storage(), 0, (size,))  # type: ignore[call-overload]
        self.shard = shard
        self.is_collective = axis.group is not None
        self._resize(0)  # set_ has taken memory for the size
        self.is_whole, self.is_gathered = size == 0, False

    def take(self) -> None:
        self._resize(self.whole.numel() * self.whole.element_size())
        self.is_whole = True

    def all_gather_start(self, shard: torch.Tensor) -> Pending:
        self.take()
        gathering = self._gather_start(self.whole, shard)

        def arrived() -> None:
            gathering.wait()
            self.is_gathered = True

        return Pending(self.whole, then=arrived)

    def serve(self, shard: torch.Tensor) -> None:
        self._gather_start(torch.empty(self.whole.numel(), dtype=shard.dtype, device=shard.device), shard).wait()

    def _gather_start(self, whole: torch.Tensor, shard: torch.Tensor) -> Pending:
        return all_gather_start(whole, shard, self._axis)

    def write_back(self) -> None:
        if self.is_gathered and self.shard is not None:
            self.shard.copy_(slice_dim0(self.whole, self._axis))

    def free(self) -> None:
        self.write_back()
        self.discard()

    def discard(self) -> None:
        self._resize(0)
        self.is_whole, self.is_gathered = self.whole.numel() == 0, False

    def _resize(self, size: int) -> None:
        """``size`` bytes of memory, unless ``parameter.numpy()`` was called: the array has the memory, which stays."""
        if (storage := self.whole.untyped_storage()).resizable():
            storage.resize_(size)
