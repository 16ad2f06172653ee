"""A flat shard: the part of one global tensor that a rank holds, for saving it or for having it filled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Protocol

import torch
from torch import nn

from megatron_ds.shard import ShardSpec, in_order, memory_order, spec_of
from megatron_ds.shard.boxes import Box, rectangles


class Holder(Protocol):
    """Memory that exists only between ``acquire`` and ``release``, like optimizer state on a disk."""

    def acquire(self) -> torch.Tensor:
        """1-D, until :meth:`release`."""
        ...

    def release(self, changed: bool) -> None: ...


@dataclass(frozen=True)
class FlatShard:
    """A flat range of this rank's tensor-parallel box of a global tensor.

    Args:
        name: global tensor name.
        kind: ``"param"``, or the optimizer state it is (``"exp_avg"``, ``"exp_avg_sq"``, ...).
        global_shape: shape of the whole tensor.
        box_offset, box_shape: this rank's tensor-parallel box (``ShardSpec.offset``, ``.local_shape``).
        start, stop: the flat range of the box that this rank holds, in elements.
        data: 1-D, contiguous, ``stop - start`` elements, any float dtype, on any device. The meta device where
            ``holder`` has the elements, from its ``offset`` on.
        order: the box's dims from the slowest to the fastest along that range; empty: row-major.
    """

    name: str
    kind: str
    global_shape: tuple[int, ...]
    box_offset: tuple[int, ...]
    box_shape: tuple[int, ...]
    start: int
    stop: int
    data: torch.Tensor
    holder: Holder | None = None
    offset: int = 0
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.data.dim() != 1 or self.data.numel() != self.stop - self.start or not self.data.is_contiguous():
            raise ValueError(
                f"{self.kind} of {self.name}: data must be 1-D, contiguous, of {self.stop - self.start} elements "
                f"(range [{self.start}, {self.stop})), not of shape {list(self.data.shape)}"
            )
        if not 0 <= self.start <= self.stop <= prod(self.box_shape):
            raise ValueError(
                f"{self.kind} of {self.name}: range [{self.start}, {self.stop}) is not inside its box of shape "
                f"{list(self.box_shape)}"
            )
        inside = len(self.global_shape) == len(self.box_offset) == len(self.box_shape) and all(
            o >= 0 and o + b <= g for o, b, g in zip(self.box_offset, self.box_shape, self.global_shape)
        )
        if not inside:
            raise ValueError(
                f"{self.kind} of {self.name}: box at {list(self.box_offset)} of shape {list(self.box_shape)} is "
                f"not inside the tensor of shape {list(self.global_shape)}"
            )

    @staticmethod
    def of(spec: ShardSpec, kind: str, data: torch.Tensor, start: int = 0, stop: int | None = None) -> FlatShard:
        """The range ``[start, stop)`` (default: all) of the local tensor that ``spec`` describes.

        ``data`` holds exactly that range: 1-D in the spec's order, or all of it in any dense shape.
        """
        order = spec.order if data.dim() == 1 else memory_order(data)
        dense = data.permute(order) if order and data.dim() > 1 else data
        if not dense.is_contiguous():
            raise ValueError(f"{kind} of {spec.name}: data of shape {list(data.shape)} is not contiguous")
        stop = prod(spec.local_shape) if stop is None else stop
        flat = dense.detach().view(-1)
        place = (spec.name, kind, spec.global_shape, spec.offset, spec.local_shape)
        return FlatShard(*place, start, stop, flat, order=order)

    @staticmethod
    def from_holder(
        spec: ShardSpec, kind: str, holder: Holder, offset: int, dtype: torch.dtype, start: int, stop: int
    ) -> FlatShard:
        """The range ``[start, stop)`` of the local tensor, which ``holder`` has from its element ``offset`` on."""
        data = torch.empty(stop - start, dtype=dtype, device="meta")
        place = (spec.name, kind, spec.global_shape, spec.offset, spec.local_shape)
        return FlatShard(*place, start, stop, data, holder, offset, spec.order)

    def tensor(self, acquired: torch.Tensor | None) -> torch.Tensor:
        """The elements: ``data``, or their part of what the holder gave."""
        return self.data if acquired is None else acquired.narrow(0, self.offset, self.stop - self.start)

    @staticmethod
    def whole(name: str, kind: str, data: torch.Tensor) -> FlatShard:
        """All of a tensor."""
        shape = tuple(data.shape)
        return FlatShard(name, kind, shape, (0,) * len(shape), shape, 0, data.numel(), data.detach().reshape(-1))

    def cut(self, begin: int, end: int) -> FlatShard:
        """The elements ``[begin, end)`` of this flat shard."""
        place = (self.name, self.kind, self.global_shape, self.box_offset, self.box_shape)
        start, stop, data = self.start + begin, self.start + end, self.data[begin:end]
        return FlatShard(*place, start, stop, data, self.holder, self.offset + begin, self.order)

    def first_rows(self, count: int, shape: tuple[int, ...]) -> FlatShard | None:
        """What this holds of the first ``count`` rows (dim 0), as a flat shard of a tensor of another ``shape``.

        The two tensors differ in their number of rows alone. None: this flat shard holds none of those rows. Rows must
        lie one after the other.
        """
        assert self.order[:1] in ((), (0,)), "dim 0 is not the slowest in memory"
        rows = min(count - self.box_offset[0], self.box_shape[0])
        stop = min(self.stop, rows * prod(self.box_shape[1:]))
        if rows <= 0 or stop <= self.start:
            return None
        box_shape = (rows, *self.box_shape[1:])
        data = self.data[: stop - self.start]
        return FlatShard(
            *(self.name, self.kind, shape, self.box_offset, box_shape, self.start, stop, data),
            *(self.holder, self.offset, self.order),
        )

    def boxes(self) -> list[Box]:
        """This flat shard as boxes in global coordinates, in the order in which ``data`` holds them."""
        if not self.order:
            return [box.moved(self.box_offset) for box in rectangles(self.box_shape, self.start, self.stop)]
        places = [self.order.index(dim) for dim in range(len(self.order))]
        found = rectangles(tuple(self.box_shape[dim] for dim in self.order), self.start, self.stop)
        turned = [Box(*(tuple(sizes[p] for p in places) for sizes in (box.offset, box.shape))) for box in found]
        return [box.moved(self.box_offset) for box in turned]

    def parts(self, acquired: torch.Tensor | None = None) -> Iterator[tuple[Box, torch.Tensor]]:
        """Each of :meth:`boxes` with its elements, a view of the box's shape; ``acquired``: what the holder gave."""
        data, begin = self.tensor(acquired), 0
        for box in self.boxes():
            yield box, in_order(data[begin : begin + box.numel], box.shape, self.order)
            begin += box.numel

    def row_major(self, acquired: torch.Tensor | None = None) -> torch.Tensor:
        """1-D: the elements box by box, each row-major, as files hold them. A copy where memory has another order."""
        if not self.order or self.start == self.stop:
            return self.tensor(acquired)
        return torch.cat([part.reshape(-1) for _, part in self.parts(acquired)])


def share_out(flat_shards: Sequence[FlatShard], index: int, count: int) -> list[FlatShard]:
    """Share ``index`` of ``count`` near-equal shares of what ``count`` ranks hold alike; the shares tile it.

    The list is cut as if it were laid end to end, so that all shares together have at most ``count - 1`` flat shards
    more than the list.
    """
    total = sum(flat_shard.data.nbytes for flat_shard in flat_shards)
    first, last = total * index // count, total * (index + 1) // count
    found, place = [], 0
    for flat_shard in flat_shards:
        numel, width = flat_shard.data.numel(), flat_shard.data.itemsize
        # An element belongs to the share in which its first byte lies.
        begin, end = (min(max(-(-(edge - place) // width), 0), numel) for edge in (first, last))
        if begin < end or (not numel and index == 0):
            found.append(flat_shard.cut(begin, end))
        place += numel * width
    return found


def buffers_with_shards(stages: Iterable[nn.Module], for_load: bool, first_replica: bool) -> list[FlatShard]:
    """What a checkpoint keeps besides parameters: buffers that have a :class:`ShardSpec`, such as a recipe's scales.

    Args:
        for_load: list all that this rank holds, and not what it saves alone.
        first_replica: whether this rank is the first of those that hold the same parts; it saves.
    """
    found = []
    for buffer in (buffer for stage in stages for buffer in stage.buffers() if hasattr(buffer, "shard")):
        spec = spec_of(buffer)
        if for_load or (first_replica and not spec.replica):
            found.append(FlatShard.of(spec, "buffer", buffer))
    return found


def acquired(
    flat_shards: Sequence[FlatShard], changed: bool = False
) -> Iterator[tuple[list[FlatShard], torch.Tensor | None]]:
    """Flat shards grouped by their holder, each group with the holder's memory, acquired once; None without a holder.

    The memory is released when the next group is asked for.

    Args:
        flat_shards: in any order; neighbours with the same holder are one group.
        changed: the body of the loop writes into them.
    """
    for _, run in groupby(flat_shards, key=lambda flat_shard: id(flat_shard.holder)):
        group = list(run)
        holder = group[0].holder
        yield group, None if holder is None else holder.acquire()
        if holder is not None:
            holder.release(changed=changed)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, 1-D uint8 in row-major order: a view of a contiguous tensor, else a copy.

    A tensor of one element is contiguous with any stride, and torch views as bytes what has a stride of 1.
    """
    return tensor.detach().contiguous().reshape(-1).unsqueeze(-1).view(torch.uint8).view(-1)
