"""A flat buffer cut into one slice a rank, and the two collectives that a bucket needs of it.

:class:`FlatBuffer` is ordinary memory and sends through the process group (NCCL, or gloo between hosts).
:class:`SharedFlatBuffer` lies in an arena that the ranks of one host map, so that nothing is sent at all.
"""

from __future__ import annotations

import torch

from megatron_ds import comm
from megatron_ds.comm import Pending
from megatron_ds.mesh import Axis
from megatron_ds.shared_memory import SharedArena, Tokens

_CHUNK = 1 << 16
"""Elements added at a time where there are several peers, so that the sum stays in the cache between them."""


class FlatBuffer:
    """``whole`` (``[size]``, zeros) and its slice ``shard`` (``[size / axis.size]``) that this rank owns."""

    def __init__(self, whole: torch.Tensor, axis: Axis):
        self.whole = whole
        self.axis = axis
        self.shard = comm.slice_dim0(whole, axis)

    @staticmethod
    def create(
        size: int, dtype: torch.dtype, device: torch.device, axis: Axis, arena: SharedArena | None
    ) -> FlatBuffer:
        if arena is not None:
            return SharedFlatBuffer(arena.take(size, dtype), axis)
        return FlatBuffer(torch.zeros(size, dtype=dtype, device=device), axis)

    def reduce_scatter_start(self) -> Pending:
        """Sum over the axis in place: afterwards ``shard`` holds the sum of all ranks' slices, the rest is void."""
        return comm.reduce_scatter_start(self.shard, self.whole, self.axis)

    def all_gather_start(self) -> Pending:
        """Collect every rank's ``shard`` in place."""
        return comm.all_gather_start(self.whole, self.shard, self.axis)


class SharedFlatBuffer(FlatBuffer):
    """A buffer of which ``by_rank`` are all ranks' copies.

    A rank's copy is read by its peers until they have done their ``wait()``. Whoever writes it again must know that
    they have: from any tokens that they sent afterwards.
    """

    def __init__(self, by_rank: list[torch.Tensor], axis: Axis):
        super().__init__(by_rank[axis.rank], axis)
        self._peers = [(axis.rank - step) % axis.size for step in range(1, axis.size)]
        self._by_rank = by_rank

    def reduce_scatter_start(self) -> Pending:
        tokens = Tokens(self.axis)

        def add_up() -> None:
            tokens.wait()
            theirs = [comm.slice_dim0(self._by_rank[peer], self.axis) for peer in self._peers]
            step = self.shard.numel() if len(theirs) == 1 else _CHUNK
            for start in range(0, self.shard.numel(), max(step, 1)):
                mine = self.shard[start : start + step]
                for other in theirs:  # the order of comm's exchange: the same bits on one host and on several
                    mine.add_(other[start : start + step])

        return Pending(self.shard, then=add_up)

    def all_gather_start(self) -> Pending:
        tokens = Tokens(self.axis)

        def copy() -> None:
            tokens.wait()
            for peer in self._peers:
                size = self.shard.numel()
                part = slice(peer * size, (peer + 1) * size)
                self.whole[part].copy_(self._by_rank[peer][part])

        return Pending(self.whole, then=copy)
