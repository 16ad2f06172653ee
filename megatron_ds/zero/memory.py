"""The flat memory of a bucket: what is whole between two uses, and what is only this rank's slice of it.

:class:`WholeBuffer` is whole all the time (parameters up to stage 2, gradients up to stage 1): the slice is a part of
it. :class:`TransientGradients` and :class:`TransientParameters` have memory of their own for the slice, and for the
whole only as long as it is written or read; so have :class:`Float8Parameters`, whose FP8 codes are what ranks gather.
Buckets treat them alike: for what is always whole, taking and freeing do nothing. How the ranks reach each other's
slices is for :mod:`megatron_ds.comm.buffers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_ds import comm
from megatron_ds.comm import Pending
from megatron_ds.comm.buffers import Buffers, GroupGathered, Slot, Slots
from megatron_ds.mesh import Axis
from megatron_ds.zero.buckets import BucketLayout
from megatron_ds.zero.state import RegionAccess
from megatron_ds.zero.store import Store
from megatron_ds.zero.store.device import DeviceStore, ResidentRegion


class WholeBuffer:
    """``whole`` (``[size]``, zeros) and its slice ``shard`` (``[size / axis.size]``) that this rank owns."""

    transient = False
    is_collective = False
    has_copy = False
    empty = False
    exactly = True

    def __init__(self, name: str, size: int, dtype: torch.dtype, buffers: Buffers):
        self._memory = buffers.whole(size, dtype)
        self.whole: torch.Tensor = self._memory.whole
        self.axis = buffers.axis
        self.shard = comm.slice_dim0(self.whole, self.axis)
        self.holding = RegionAccess(ResidentRegion(name, self.shard))

    def take(self) -> torch.Tensor:
        return self.whole

    def reduce_scatter_start(self, key: int = 0) -> Pending | None:
        """Sum over the axis in place: afterwards ``shard`` holds the sum of all ranks' slices, the rest is void.

        None on an axis of one rank, where there is nothing to sum. ``key``: of this rank and this sum, where what is
        sent is rounded by chance.
        """
        return None if self.axis.group is None else self._memory.reduce_scatter_start(key)

    def all_gather_start(self) -> Pending | None:
        """Collect every rank's ``shard`` in place."""
        return None if self.axis.group is None else self._memory.all_gather_start()

    def start_step(self) -> None:
        pass

    def serve(self) -> None:
        pass

    def write_back(self) -> None:
        pass

    def free(self) -> None:
        pass

    def discard(self) -> None:
        pass

    def cancel(self) -> None:
        pass

    def keep_slice(self) -> None:
        pass


class TransientGradients:
    """A bucket's gradients from stage 2 on: ``shard`` is kept, ``whole`` only while a backward pass fills it.

    The order is :meth:`take`, writing ``whole``, :meth:`reduce_scatter_start` and its ``wait()``, :meth:`free`. Several
    rounds add up in ``shard``; ``empty`` says that the next one is the first.
    """

    transient = True

    def __init__(self, size: int, axis: Axis, slots: Slots):
        self.size, self._slots = size, slots
        self.shard = torch.zeros(size // axis.size, dtype=slots.dtype, device=slots.device)
        self.empty = True
        self._slot: Slot | None = None

    @property
    def whole(self) -> torch.Tensor | None:
        return None if self._slot is None else self._slot.whole

    def take(self) -> torch.Tensor:
        assert self._slot is None, "the gradients of the micro-batch before have not been freed"
        self._slot = self._slots.take(self.size)
        return self._slot.whole

    def start_step(self) -> None:
        """Forget what ``shard`` holds."""
        self.empty = True

    def reduce_scatter_start(self, key: int = 0) -> Pending:
        """Add the sum over the axis of this rank's slice of ``whole`` to ``shard``; ``key``: as of WholeBuffer."""
        assert self._slot is not None
        add, self.empty = not self.empty, False
        return self._slot.reduce_scatter_start(self.shard, add, key)

    def free(self) -> None:
        """Give ``whole`` back, once every peer has read it. Collective: all ranks, in one order."""
        if self._slot is not None:
            self._slot.free()
            self._slot = None


class TransientParameters:
    """A unit's parameters at stage 3: ``shard`` is kept, ``whole`` only while somebody computes with it.

    What a module writes into ``whole`` stays: it goes into the shard when ``whole`` is freed, or, where peers may be
    reading the shard then, with the next :meth:`write_back`.

    Args:
        store: where the shard lives if it is offloaded; None: where ``buffers`` has it.
    """

    transient = True
    exactly = True  # what is gathered are the parameters themselves

    def __init__(self, name: str, size: int, dtype: torch.dtype, buffers: Buffers, store: Store | None):
        self.axis = axis = buffers.axis
        if store is None:
            self._memory = buffers.gathered(size, dtype)
            assert self._memory.shard is not None
            self.holding = RegionAccess(ResidentRegion(name, self._memory.shard))
        else:
            self.holding = RegionAccess(store.allocate(name, size // axis.size, dtype))
            shard = self.shard if self.holding.resident else None
            self._memory = GroupGathered(size, dtype, buffers.device, axis, shard)
        self.whole: torch.Tensor = self._memory.whole

    @property
    def shard(self) -> torch.Tensor:
        """``[size / axis.size]``, where it is resident."""
        tensor = self.holding.region.tensor
        assert tensor is not None, "an offloaded shard is held for each use"
        return tensor

    @property
    def is_whole(self) -> bool:
        return self._memory.is_whole

    @property
    def has_copy(self) -> bool:
        """Whether ``whole`` is a copy of all shards, in which something may have been written since."""
        return self._memory.is_gathered

    @property
    def is_collective(self) -> bool:
        """Whether a gather takes all ranks of the axis at the same time."""
        return self._memory.is_collective

    def serve(self) -> None:
        """Take part in a gather that peers need, and leave ``whole`` as it is."""
        self._memory.serve(self.holding.acquire())
        self.holding.release(changed=False)

    def take(self) -> torch.Tensor:
        """Memory for ``whole``, uninitialised."""
        self._memory.take()
        return self.whole

    def free(self) -> None:
        """Give the memory back; what was written stays."""
        self._memory.free()

    def write_back(self) -> None:
        """The shard, where it is resident, becomes what ``whole`` is. No peer may be reading."""
        self._memory.write_back()

    def discard(self) -> None:
        """Give the memory back, and what was written."""
        self._memory.discard()

    def keep_slice(self) -> None:
        """The shard, wherever it lives, becomes what ``whole`` is, and ``whole`` is freed."""
        self.holding.acquire().copy_(comm.slice_dim0(self.whole, self.axis))
        self.holding.release(changed=True)
        self.discard()

    def all_gather_start(self) -> Pending:
        """Take the memory and collect every rank's ``shard`` in it."""
        if self.holding.resident:
            return self._memory.all_gather_start(self.shard)
        self.take()
        self.holding.read_start()

        def fetch_and_gather() -> None:
            self._memory.all_gather_start(self.holding.acquire()).wait()
            self.holding.release(changed=False)

        return Pending(self.whole, then=fetch_and_gather)

    def cancel(self) -> None:
        """A gather that was started is not waited for. Only where the shard is not resident: there it has only been
        fetched so far."""
        self.holding.acquire()
        self.holding.release(changed=False)


class Float8Parameters(TransientParameters):
    """Parameters in fp32 or fp64 of which FP8 ``codes`` are gathered: a byte of each element, or two.

    ``shard`` is kept, and ``codes`` are whole all the time, or a unit's while it is used. ``whole`` has memory only
    while the parameters themselves are gathered, with ``exactly``. See :mod:`megatron_ds.zero.float8_gathering`.

    Args:
        store: where the shard lives, and that of the codes of a unit, if it is offloaded.
    """

    def __init__(self, name: str, layout: BucketLayout, buffers: Buffers, store: Store | None):
        self.axis, self.transient, self.exactly = buffers.axis, layout.key.unit is not None, False
        place = store or DeviceStore(buffers.device)
        self.holding = RegionAccess(place.allocate(name, layout.shard_size, layout.key.dtype))
        # Through the process group, wherever the ranks are: it is seldom.
        shard = self.shard if self.holding.resident else None
        self._memory = GroupGathered(layout.size, layout.key.dtype, buffers.device, buffers.axis, shard)
        self.whole = self._memory.whole
        self.codes: list[WholeBuffer | TransientParameters] = []
        for _ in range(layout.codes):
            if self.transient:
                self.codes.append(TransientParameters(name, layout.size, torch.uint8, buffers, store))
            else:
                self.codes.append(WholeBuffer(name, layout.size, torch.uint8, buffers))

    @property
    def is_collective(self) -> bool:
        return self.codes[0].is_collective

    def all_gather_start(self) -> Pending:
        if self.exactly:
            return super().all_gather_start()
        started = [codes.all_gather_start() for codes in self.codes]
        return Pending(self.whole, then=lambda: [gather.wait() for gather in started if gather is not None])

    @contextmanager
    def masters(self) -> Iterator[torch.Tensor]:
        """``shard``, wherever it lives, to read."""
        yield self.holding.acquire()
        self.holding.release(changed=False)

    @contextmanager
    def shards_of_codes(self) -> Iterator[list[torch.Tensor]]:
        """What is written into these becomes this rank's slice of the codes. Offloaded ones are fetched afterwards, one
        after the other: a store's staging memory may have room for one."""
        size, away = self.holding.region.numel, [codes for codes in self.codes if not codes.holding.resident]
        made = {id(codes): codes.whole.new_empty(size) for codes in away}
        yield [made[id(codes)] if codes in away else codes.shard for codes in self.codes]
        for codes in away:
            codes.holding.acquire().copy_(made[id(codes)])
            codes.holding.release(changed=True)

    def serve(self) -> None:
        for codes in self.codes:
            codes.serve()

    def cancel(self) -> None:
        for codes in self.codes:
            codes.cancel()

    def free(self) -> None:
        super().free()
        for codes in self.codes:
            codes.free()

    def discard(self) -> None:
        super().discard()
        for codes in self.codes:
            codes.discard()


def parameter_memory(
    name: str, layout: BucketLayout, buffers: Buffers, store: Store | None
) -> WholeBuffer | TransientParameters:
    """Of a bucket's parameters. ``store``: as of :class:`TransientParameters`."""
    if layout.codes:
        return Float8Parameters(name, layout, buffers, store)
    if layout.key.unit is None:
        return WholeBuffer(name, layout.size, layout.key.dtype, buffers)
    return TransientParameters(name, layout.size, layout.key.dtype, buffers, store)
