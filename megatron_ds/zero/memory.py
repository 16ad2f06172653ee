"""The flat memory of a bucket, and the two collectives that it needs of it.

Between two uses a rank keeps a bucket either whole or as its own slice. :class:`WholeBuffer` is the first (parameters
up to stage 2, gradients up to stage 1): the slice is a part of it. :class:`TransientGradients` and
:class:`TransientParameters` are the second: the slice is memory of its own, and the whole is there for as long as it is
written or read.

Each has two ways to its peers: through the process group (NCCL, or gloo between hosts), or by reading their memory in
an arena that the ranks of one host map, so that nothing is sent at all.
"""

from __future__ import annotations

import heapq

import torch

from megatron_ds import comm
from megatron_ds.comm import Pending
from megatron_ds.comm.local.arena import PrivateView, SharedArena
from megatron_ds.comm.local.tokens import Tokens
from megatron_ds.mesh import Axis
from megatron_ds.zero.state import RegionAccess
from megatron_ds.zero.store import DeviceStore, Region, Store
from megatron_ds.zero.store.device import ResidentRegion

_CHUNK = 1 << 16
"""Elements added at a time where there are several peers, so that the sum stays in the cache between them."""


class WholeBuffer:
    """``whole`` (``[size]``, zeros) and its slice ``shard`` (``[size / axis.size]``) that this rank owns."""

    def __init__(self, whole: torch.Tensor, axis: Axis):
        self.whole = whole
        self.axis = axis
        self.shard = comm.slice_dim0(whole, axis)

    @staticmethod
    def create(
        size: int, dtype: torch.dtype, device: torch.device, axis: Axis, arena: SharedArena | None
    ) -> WholeBuffer:
        if arena is not None:
            return SharedWholeBuffer(arena.take(size, dtype), axis, arena)
        return WholeBuffer(torch.zeros(size, dtype=dtype, device=device), axis)

    def reduce_scatter_start(self) -> Pending:
        """Sum over the axis in place: afterwards ``shard`` holds the sum of all ranks' slices, the rest is void."""
        return comm.reduce_scatter_start(self.shard, self.whole, self.axis)

    def all_gather_start(self) -> Pending:
        """Collect every rank's ``shard`` in place."""
        return comm.all_gather_start(self.whole, self.shard, self.axis)


class SharedWholeBuffer(WholeBuffer):
    """A buffer of which ``by_rank`` are all ranks' copies.

    A rank's copy is read by its peers until they have done their ``wait()``. Whoever writes it again must know that
    they have: from any tokens that they sent afterwards. A reduction sends tokens that its buffer is complete; the
    ``wait()`` of a gather waits until every peer has published its parameters.
    """

    def __init__(self, by_rank: list[torch.Tensor], axis: Axis, arena: SharedArena):
        super().__init__(by_rank[axis.rank], axis)
        self._by_rank, self._arena = by_rank, arena

    def reduce_scatter_start(self) -> Pending:
        tokens = self._arena.tokens()

        def add_up() -> None:
            tokens.wait()
            _add_peers(self.shard, [comm.slice_dim0(self._by_rank[peer], self.axis) for peer in _peers(self.axis)])

        return Pending(self.shard, then=add_up)

    def all_gather_start(self) -> Pending:
        def copy() -> None:
            self._arena.wait_published()
            for peer in _peers(self.axis):
                size = self.shard.numel()
                part = slice(peer * size, (peer + 1) * size)
                self.whole[part].copy_(self._by_rank[peer][part])

        return Pending(self.whole, then=copy)


class GradientPool:
    """Memory for the whole gradients of a few buckets at a time, all of one dtype: slots that go from one to the next.

    On one host the slots lie in an arena, as many as there are buckets; only those ever written take memory, and the
    lowest free one is taken first. Which slot a bucket gets is each rank's own affair: it tells its peers.
    """

    def __init__(
        self, slots: int, numel: int, dtype: torch.dtype, device: torch.device, axis: Axis, arena: SharedArena | None
    ):
        self.axis, self.dtype, self.device = axis, dtype, device
        self._free = list(range(slots))
        self._stride = self.stride(numel)
        self.arena = arena
        self._by_rank = None if arena is None else arena.take(slots * self._stride, dtype)

    @staticmethod
    def stride(numel: int) -> int:
        """Elements from slot to slot: whole pages."""
        return -(-numel // 1024) * 1024

    def take(self, size: int) -> tuple[int, torch.Tensor]:
        """A slot and its ``[size]`` elements, uninitialised."""
        slot = heapq.heappop(self._free)
        if self._by_rank is None:
            return slot, torch.empty(size, dtype=self.dtype, device=self.device)
        return slot, self.of_rank(self.axis.rank, slot, size)

    def of_rank(self, rank: int, slot: int, size: int) -> torch.Tensor:
        """The same of any rank of the axis that shares its memory."""
        assert self._by_rank is not None
        return self._by_rank[rank].narrow(0, slot * self._stride, size)

    def give_back(self, slot: int) -> None:
        heapq.heappush(self._free, slot)


class TransientGradients:
    """A bucket's gradients from stage 2 on: ``shard`` is kept, ``whole`` only while a backward pass fills it.

    The order is :meth:`take`, writing ``whole``, :meth:`reduce_scatter_start` and its ``wait()``, :meth:`free`. Several
    rounds add up in ``shard``; ``empty`` says that the next one is the first.
    """

    def __init__(self, size: int, axis: Axis, pool: GradientPool):
        self.axis, self.size = axis, size
        self.shard = torch.zeros(size // axis.size, dtype=pool.dtype, device=pool.device)
        self.whole: torch.Tensor | None = None
        self.empty = True
        self._pool = pool
        self._slot = -1
        self._read: Tokens | None = None

    def take(self) -> torch.Tensor:
        assert self.whole is None, "the gradients of the micro-batch before have not been freed"
        self._slot, self.whole = self._pool.take(self.size)
        return self.whole

    def reduce_scatter_start(self) -> Pending:
        """Add the sum over the axis of this rank's slice of ``whole`` to ``shard``."""
        assert self.whole is not None
        own = comm.slice_dim0(self.whole, self.axis)
        arena = self._pool.arena
        if arena is None:
            scattering = comm.reduce_scatter_start(own, self.whole, self.axis)
            return Pending(self.shard, then=lambda: self._add_to_shard(scattering.wait()))
        tokens = arena.tokens(self._slot)

        def add_up() -> None:
            slots = tokens.wait()
            theirs = [
                comm.slice_dim0(self._pool.of_rank(peer, slots[peer], self.size), self.axis)
                for peer in _peers(self.axis)
            ]
            if len(theirs) == 1 and self.empty:  # in one pass
                torch.add(own, theirs[0], out=self.shard)
                self.empty = False
            else:
                _add_peers(own, theirs)
                self._add_to_shard(own)
            self._read = arena.tokens()

        return Pending(self.shard, then=add_up)

    def _add_to_shard(self, summed: torch.Tensor) -> None:
        self.shard.copy_(summed) if self.empty else self.shard.add_(summed)
        self.empty = False

    def free(self) -> None:
        """Give ``whole`` back, once every peer has read it. Collective with shared memory: all ranks, in one order."""
        if self._read is not None:
            self._read.wait()
            self._read = None
        if self.whole is not None:
            self._pool.give_back(self._slot)
        self.whole = None


class TransientParameters:
    """A unit's parameters at stage 3: ``shard`` is kept, ``whole`` only while somebody computes with it.

    ``whole`` is one tensor all the time, whose storage is empty between uses. So everything that autograd saved of it,
    transposed views included, is good again as soon as it has been gathered once more.

    In shared memory the shards of all ranks lie in a row, and ``whole`` is this rank's private view of them: nothing is
    copied at all: a gather waits until every peer has published its shard. Whoever changes a shard must know that no
    peer is reading.

    What a module writes into ``whole`` stays: it goes into the shard when ``whole`` is freed. In shared memory it stays
    in this rank's view until :meth:`write_back`, when no peer reads.

    Args:
        store: where the shard lives if it is offloaded; None: in device memory, or in the arena.
    """

    def __init__(
        self,
        name: str,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        axis: Axis,
        arena: SharedArena | None,
        store: Store | None,
    ):
        self.axis = axis
        self._arena = arena
        self._view: PrivateView | None = None
        self._taken = size == 0
        self._gathered = False  # ``whole`` has the values
        self._written = False  # this rank's view has, and stays until they are in the shard
        if arena is not None and store is None:
            shards, self._view = arena.take_common(size, dtype)
            self.whole = self._view.tensor
            region: Region = ResidentRegion(name, comm.slice_dim0(shards, axis))
        else:
            self.whole = torch.empty(0, dtype=dtype, device=device)
            self.whole.set_(self.whole.untyped_storage(), 0, (size,))  # type: ignore[call-overload]
            region = (store or DeviceStore(device)).allocate(name, size // axis.size, dtype)
        self.holding = RegionAccess(region)

    @property
    def shard(self) -> torch.Tensor:
        """``[size / axis.size]``, where it is resident."""
        assert isinstance(self.holding.region, ResidentRegion), "an offloaded shard is held for each use"
        return self.holding.region.tensor

    @property
    def is_whole(self) -> bool:
        return self._taken

    @property
    def is_gathered(self) -> bool:
        """Whether ``whole`` has the values."""
        return self._gathered

    @property
    def is_collective(self) -> bool:
        """Whether a gather takes all ranks of the axis at the same time."""
        return self._view is None and self.axis.group is not None

    def take(self) -> torch.Tensor:
        """Memory for ``whole``, uninitialised."""
        if self._view is None:
            self.whole.untyped_storage().resize_(self.whole.numel() * self.whole.element_size())
        self._taken = True
        return self.whole

    def free(self) -> None:
        """Give the memory back; what was written stays."""
        if self._view is None:
            self.write_back()
        elif self._written or self._view.written():
            self._written = True
            self._taken = self._gathered = False
            return
        self.discard()

    def write_back(self) -> None:
        """The shard, where it is resident, becomes what ``whole`` is. In shared memory no peer may be reading."""
        if self._view is None and self._gathered and self.holding.resident:
            self.shard.copy_(comm.slice_dim0(self.whole, self.axis))
        elif self._view is not None and (self._written or (self._gathered and self._view.written())):
            self.shard.copy_(comm.slice_dim0(self.whole, self.axis))
            self._written = True

    def discard(self) -> None:
        """Give the memory back, and what was written."""
        if self._view is None:
            self.whole.untyped_storage().resize_(0)
        else:
            self._view.forget()
        self._taken = self.whole.numel() == 0
        self._gathered = self._written = False

    def all_gather_start(self) -> Pending:
        """Take the memory and collect every rank's ``shard`` in it."""
        self.take()
        if self._view is not None:
            return Pending(self.whole, then=self._look)
        if self.holding.resident:
            gathering = comm.all_gather_start(self.whole, self.shard, self.axis)
            return Pending(self.whole, then=lambda: self._arrived(gathering))
        self.holding.read_start()

        def fetch_and_gather() -> None:
            self._arrived(comm.all_gather_start(self.whole, self.holding.acquire(), self.axis))
            self.holding.release(changed=False)

        return Pending(self.whole, then=fetch_and_gather)

    def _arrived(self, gathering: Pending) -> None:
        gathering.wait()
        self._gathered = True

    def _look(self) -> None:
        assert self._arena is not None
        self._arena.wait_published()
        self._gathered = True


def _peers(axis: Axis) -> list[int]:
    """The other ranks, in the order in which comm's exchange adds them: the same bits on one host and on several."""
    return [(axis.rank - step) % axis.size for step in range(1, axis.size)]


def _add_peers(own: torch.Tensor, theirs: list[torch.Tensor]) -> None:
    step = own.numel() if len(theirs) == 1 else _CHUNK
    for start in range(0, own.numel(), max(step, 1)):
        mine = own[start : start + step]
        for other in theirs:
            mine.add_(other[start : start + step])
