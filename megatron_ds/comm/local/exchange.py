"""Sums and gathers of activations between layers through shared memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_ds.comm.local.arena import SharedArena
from megatron_ds.mesh import Axis

_CHUNK = 1 << 16  # elements added at a time where there are several peers, so that the sum stays in the cache


@dataclass
class _Slot:
    """A piece of every rank's arena. ``free_after``: number of the exchange whose tokens prove that all have read it;
    None while it is in use."""

    blocks: list[torch.Tensor]  # by rank, bytes
    free_after: int | None = -1


class LocalExchange:
    """Sums and gathers of activations between layers, for the ranks of one axis on one host.

    A rank writes its tensor into its own part of a *slot* and sends its tokens; when it waits, it reads the peers'
    parts. As with any collective all ranks start and wait in the same order, so they choose the same slots without
    asking. A slot is free again once every peer is known to have read it: tokens have come of an exchange that they
    started after they had. Where no slot is free, and for what is too large, the group does it. Sums of a few float64,
    which every train step needs, go as tokens and need no slot.

    Small tensors gain most over gloo.
    """

    SLOTS = 3  # two in turn, and one for what waits longer
    LARGEST = 1 << 26  # bytes
    FIRST = 1 << 18  # bytes of a slot at least: small tensors come in many sizes, and a larger one makes all slots anew
    NUMBERS = 8  # of float64, at most, go as tokens: a step's two messages

    def __init__(self, axis: Axis):
        self.axis = axis
        self._numbers: SharedArena | None = None  # for its tokens alone
        self._asked = False  # whether there can be one
        self._arena: SharedArena | None = None
        self._slots: list[_Slot] = []
        self._slot_bytes = 0
        self._started = 0  # exchanges so far; they are numbered from 0
        self._confirmed = -1  # the latest of which this rank has all tokens

    def sum_start(self, tensor: torch.Tensor) -> Callable[[], None] | None:
        if tensor.dtype == torch.float64 and 0 < tensor.numel() <= self.NUMBERS and tensor.device.type == "cpu":
            return self._sum_numbers(tensor)
        slot = self._take(tensor, tensor)
        if slot is None:
            return None
        own = tensor.detach().view(-1)
        parts = [_as(block, own) for block in slot.blocks]
        parts[self.axis.rank].copy_(own)

        def add_up() -> None:
            if self.axis.size == 2:
                own.add_(parts[self.axis.peers[0]])  # of two, either order has the same bits
                return
            for start in range(0, own.numel(), _CHUNK):
                first, second, *others = (part[start : start + _CHUNK] for part in parts)
                result = own[start : start + _CHUNK]
                torch.add(first, second, out=result)  # in rank order: the same bits on every rank
                for other in others:
                    result.add_(other)

        return self._send(slot, add_up)

    def scatter_sum_start(self, output: torch.Tensor, tensor: torch.Tensor) -> Callable[[], None] | None:
        slot = self._take(tensor, output)
        if slot is None:
            return None
        own, result = tensor.detach().view(self.axis.size, -1), output.detach().view(-1)
        parts = [_as(block, own) for block in slot.blocks]
        peers = self.axis.peers
        for peer in peers:
            parts[self.axis.rank][peer].copy_(own[peer])

        def add_up() -> None:
            torch.add(own[self.axis.rank], parts[peers[0]][self.axis.rank], out=result)
            for peer in peers[1:]:
                result.add_(parts[peer][self.axis.rank])

        return self._send(slot, add_up)

    def gather_start(self, output: torch.Tensor, tensor: torch.Tensor) -> Callable[[], None] | None:
        slot = self._take(output, tensor)
        if slot is None:
            return None
        result, own = output.detach().view(self.axis.size, -1), tensor.detach().view(-1)
        parts = [_as(block, own) for block in slot.blocks]
        parts[self.axis.rank].copy_(own)
        if result[self.axis.rank].data_ptr() != own.data_ptr():
            result[self.axis.rank].copy_(own)

        def copy() -> None:
            for peer in self.axis.peers:
                result[peer].copy_(parts[peer])

        return self._send(slot, copy)

    def _sum_numbers(self, tensor: torch.Tensor) -> Callable[[], None] | None:
        """A few numbers need no memory: a token carries the bits of one."""
        if not self._asked:
            self._asked, self._numbers = True, SharedArena.create(1, self.axis)
        if self._numbers is None:
            return None
        tokens = [self._numbers.tokens(bits) for bits in tensor.reshape(-1).view(torch.int64).tolist()]

        def add_up() -> None:
            by_rank = torch.tensor([token.wait() for token in tokens]).view(torch.float64).unbind(1)
            total = by_rank[0].clone()
            for other in by_rank[1:]:  # in rank order: the same bits on every rank
                total += other
            tensor.copy_(total.view(tensor.shape))

        return add_up

    def _take(self, whole: torch.Tensor, other: torch.Tensor) -> _Slot | None:
        """A free slot of at least the bytes of ``whole``, the same on all ranks."""
        fits = self.axis.layerwise and 0 < whole.nbytes <= self.LARGEST and whole.device.type == "cpu"
        if not (fits and whole.is_contiguous() and other.is_contiguous()):
            return None
        if whole.nbytes > self._slot_bytes:
            self._slot_bytes = size = max(whole.nbytes, self.FIRST)
            # What is under way keeps its slot of the old arena, and that memory, until it is done.
            arena = SharedArena.create(SharedArena.bytes_for([(size, torch.uint8)] * self.SLOTS), self.axis)
            if arena is None:
                self._slot_bytes = self.LARGEST  # and do not ask again
            self._arena = arena
            self._slots = [_Slot(arena.take(size, torch.uint8)) for _ in range(self.SLOTS) if arena is not None]
        for slot in self._slots:
            if slot.free_after is not None and slot.free_after <= self._confirmed:
                slot.free_after = None
                return slot
        return None

    def _send(self, slot: _Slot, read: Callable[[], None]) -> Callable[[], None]:
        assert self._arena is not None
        tokens, number = self._arena.tokens(), self._started
        self._started += 1

        def finish() -> None:
            tokens.wait()
            self._confirmed = max(self._confirmed, number)
            read()
            slot.free_after = self._started

        return finish


def _as(block: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The first bytes of a block as a tensor of this shape and dtype."""
    return block[: like.nbytes].view(like.dtype).view(like.shape)
