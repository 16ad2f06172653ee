"""Collectives on an axis, started and waited for. Names that torch 2.13 renamed are resolved here, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_ds.comm import local
from megatron_ds.comm.pending import Pending
from megatron_ds.mesh import Axis

_reduce_scatter: Callable[..., dist.Work | None] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)
_all_gather: Callable[..., dist.Work | None] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


EXCHANGE_BYTES = 1 << 20
"""From this size on, a CPU tensor goes straight from rank to rank instead of through gloo's own algorithms."""


def all_reduce(tensor: torch.Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduce in place over the axis and return the same tensor."""
    return all_reduce_start(tensor, axis, op).wait()


def all_reduce_start(tensor: torch.Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Pending:
    """Start an in-place all-reduce; ``wait()`` before reading or writing ``tensor``."""
    if axis.group is None:
        return Pending(tensor)
    if op == dist.ReduceOp.SUM and (finish := local.sum_start(tensor, axis)) is not None:
        return Pending(tensor, then=finish)
    return Pending(tensor, dist.all_reduce(tensor, op, group=axis.group, async_op=True))


def broadcast(tensor: torch.Tensor, axis: Axis, source: int = 0) -> torch.Tensor:
    """Give every rank of the axis the ``tensor`` of one of them, by its rank in the axis, in place."""
    if axis.group is not None and tensor.numel():
        whole = tensor.contiguous()
        dist.broadcast(movable(whole), axis.ranks[source], group=axis.group)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)
    return tensor


def reduce_scatter_start(output: torch.Tensor, tensor: torch.Tensor, axis: Axis) -> Pending:
    """Sum ``tensor`` over the axis; rank r keeps slice r of dim 0 in ``output``. ``output`` may be that very slice."""
    if axis.group is None:
        if output.data_ptr() != tensor.data_ptr():
            output.copy_(tensor)
        return Pending(output)
    if (finish := local.scatter_sum_start(output, tensor, axis)) is not None:
        return Pending(output, then=finish)
    if _prefers_exchange(tensor, axis):
        return _exchange_reduce_scatter(output, tensor, axis)
    return Pending(output, _reduce_scatter(output, tensor, group=axis.group, async_op=True))


def all_gather_start(output: torch.Tensor, tensor: torch.Tensor, axis: Axis) -> Pending:
    """Concatenate every rank's ``tensor`` along dim 0 into ``output``; ``tensor`` may be its own slice of it."""
    if axis.group is None:
        if output.data_ptr() != tensor.data_ptr():
            output.copy_(tensor)
        return Pending(output)
    if (finish := local.gather_start(output, tensor, axis)) is not None:
        return Pending(output, then=finish)
    if (moved := movable(output)) is not output:
        gathering = all_gather_start(moved, movable(tensor), axis)
        return Pending(output, then=lambda: gathering.wait())
    if _prefers_exchange(output, axis):
        return _exchange_all_gather(output, tensor, axis)
    return Pending(output, _all_gather(output, tensor, group=axis.group, async_op=True))


def all_to_all_start(output: torch.Tensor, tensor: torch.Tensor, axis: Axis) -> Pending:
    """Row ``r`` of ``tensor`` goes to rank ``r``, whose row of this rank's number it becomes; contiguous both."""
    if axis.group is None:
        output.copy_(tensor)
        return Pending(output)
    return Pending(output, dist.all_to_all_single(output, tensor, group=axis.group, async_op=True))


def movable(tensor: torch.Tensor) -> torch.Tensor:
    """The contiguous tensor, or its bytes where gloo has no name for the dtype: float8, int16, unsigned integers."""
    known = (torch.int8, torch.uint8, torch.int32, torch.int64)
    wide = tensor.dtype.is_complex or (tensor.dtype.is_floating_point and tensor.itemsize > 1)
    return tensor if wide or tensor.dtype in known else tensor.view(-1).view(torch.uint8)


def _prefers_exchange(whole: torch.Tensor, axis: Axis) -> bool:
    """Whether every rank should send each other rank its part directly.

    gloo's reduce-scatter and all-gather copy through buffers of their own, which takes a multiple of the CPU time.
    """
    return (
        whole.device.type == "cpu"
        and whole.numel() * whole.element_size() >= EXCHANGE_BYTES
        and dist.get_backend(axis.group) == "gloo"
    )


def _exchange_reduce_scatter(output: torch.Tensor, tensor: torch.Tensor, axis: Axis) -> Pending:
    parts = tensor.view(axis.size, -1)
    own, result = parts[axis.rank], output.view(-1)
    received = tensor.new_empty((axis.size - 1, parts.shape[1]))
    work: list[dist.Work | None] = []
    for part, peer in zip(received, axis.peers):
        work.append(dist.irecv(part, group=axis.group, group_src=peer))
    for step in range(1, axis.size):
        peer = (axis.rank + step) % axis.size
        work.append(dist.isend(parts[peer], group=axis.group, group_dst=peer))

    def add_up() -> None:
        if result.data_ptr() != own.data_ptr():
            result.copy_(own)
        for part in received:  # always in the same order: the sum is the same, bit for bit, in every run
            result.add_(part)

    return Pending(output, work, add_up)


def _exchange_all_gather(output: torch.Tensor, tensor: torch.Tensor, axis: Axis) -> Pending:
    parts = output.view(axis.size, -1)
    own = parts[axis.rank]
    if own.data_ptr() != tensor.data_ptr():
        own.copy_(tensor.view(-1))
    work: list[dist.Work | None] = []
    for peer in axis.peers:
        work.append(dist.irecv(parts[peer], group=axis.group, group_src=peer))
    for step in range(1, axis.size):
        work.append(dist.isend(own, group=axis.group, group_dst=(axis.rank + step) % axis.size))
    return Pending(output, work)


def gather_dim0(tensor: torch.Tensor, axis: Axis) -> Pending:
    """All-gather along dim 0 into a new tensor: ``[s / size, ...] -> [s, ...]``."""
    if axis.group is None:
        return Pending(tensor)
    output = tensor.new_empty((tensor.shape[0] * axis.size, *tensor.shape[1:]))
    return all_gather_start(output, tensor.contiguous(), axis)


def scatter_sum_dim0(tensor: torch.Tensor, axis: Axis) -> Pending:
    """Sum over the axis and keep this rank's part of dim 0, in a new tensor: ``[s, ...] -> [s / size, ...]``."""
    if axis.group is None:
        return Pending(tensor)
    output = tensor.new_empty((tensor.shape[0] // axis.size, *tensor.shape[1:]))
    return reduce_scatter_start(output, tensor.contiguous(), axis)
