"""Collectives on an :class:`~megatron_ds.mesh.Axis`, and the autograd pairs built on them.

Two layers. The plain functions move data and do nothing at all on an axis of one rank, so that one process runs the
same code as a cluster. The differentiable ones keep each forward collective beside its backward:

=============================  ==================  =====================
function                       forward             backward
=============================  ==================  =====================
:func:`copy_to_region`         identity            all-reduce
:func:`reduce_from_region`     all-reduce          identity
:func:`gather_sequence`        all-gather dim 0    reduce-scatter dim 0
:func:`reduce_scatter_sequence`  reduce-scatter dim 0  all-gather dim 0
:func:`scatter_sequence`       slice dim 0         all-gather dim 0
=============================  ==================  =====================

Names that torch 2.13 renamed are resolved here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_ds.kernels.autograd import first_derivative_only
from megatron_ds.mesh import Axis

_reduce_scatter: Callable[..., dist.Work | None] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)
_all_gather: Callable[..., dist.Work | None] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


EXCHANGE_BYTES = 1 << 20
"""From this size on, a CPU tensor goes straight from rank to rank instead of through gloo's own algorithms."""


class Pending:
    """Work in flight, a collective or a transfer: :meth:`wait` returns its result. On an axis of one rank it is done.

    ``then`` runs once, in the first :meth:`wait`, after all of ``work`` is done. ``result`` may be a function that
    gives the tensor: for what does not know its memory before it is waited for. One that raises is asked again by the
    next :meth:`wait`.
    """

    def __init__(
        self,
        result: torch.Tensor | Callable[[], torch.Tensor],
        work: dist.Work | Sequence[dist.Work | None] | None = None,
        then: Callable[[], object] | None = None,
    ):
        self.result = result
        self._work = (work,) if isinstance(work, dist.Work) else tuple(work or ())
        self._then = then

    def wait(self) -> torch.Tensor:
        for work in self._work:
            if work is not None:
                work.wait()
        self._work = ()
        if self._then is not None:
            then, self._then = self._then, None
            then()
        if not isinstance(self.result, torch.Tensor):
            self.result = self.result()
        return self.result


def all_reduce(tensor: torch.Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduce in place over the axis and return the same tensor."""
    return all_reduce_start(tensor, axis, op).wait()


def all_reduce_start(tensor: torch.Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Pending:
    """Start an in-place all-reduce; ``wait()`` before reading or writing ``tensor``."""
    if axis.group is None:
        return Pending(tensor)
    if axis.exchange is not None and op == dist.ReduceOp.SUM:
        finish = axis.exchange.sum_start(tensor, axis)
        if finish is not None:
            return Pending(tensor, then=finish)
    return Pending(tensor, dist.all_reduce(tensor, op, group=axis.group, async_op=True))


def broadcast(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Give every rank of the axis the first one's ``tensor``, in place."""
    if axis.group is not None and tensor.numel():
        whole = tensor.contiguous()
        dist.broadcast(movable(whole), axis.ranks[0], group=axis.group)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)
    return tensor


def reduce_scatter_start(output: torch.Tensor, tensor: torch.Tensor, axis: Axis) -> Pending:
    """Sum ``tensor`` over the axis; rank r keeps slice r of dim 0 in ``output``. ``output`` may be that very slice."""
    if axis.group is None:
        if output.data_ptr() != tensor.data_ptr():
            output.copy_(tensor)
        return Pending(output)
    if axis.exchange is not None:
        finish = axis.exchange.scatter_sum_start(output, tensor, axis)
        if finish is not None:
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
    if axis.exchange is not None:
        finish = axis.exchange.gather_start(output, tensor, axis)
        if finish is not None:
            return Pending(output, then=finish)
    if (moved := movable(output)) is not output:
        gathering = all_gather_start(moved, movable(tensor), axis)
        return Pending(output, then=lambda: gathering.wait())
    if _prefers_exchange(output, axis):
        return _exchange_all_gather(output, tensor, axis)
    return Pending(output, _all_gather(output, tensor, group=axis.group, async_op=True))


def movable(tensor: torch.Tensor) -> torch.Tensor:
    """The contiguous tensor, or its bytes where gloo has no name for the dtype: float8, int16, unsigned integers."""
    known = (torch.int8, torch.uint8, torch.int32, torch.int64)
    wide = tensor.dtype.is_complex or (tensor.dtype.is_floating_point and tensor.itemsize > 1)
    return tensor if wide or tensor.dtype in known else tensor.view(-1).view(torch.uint8)


def _prefers_exchange(whole: torch.Tensor, axis: Axis) -> bool:
    """Whether every rank should send each other rank its part directly.

    gloo's reduce-scatter and all-gather copy through buffers of their own. Measured for 55 MB of fp32 on 2 ranks of a
    2-core machine, CPU time a rank: reduce-scatter 61 ms, this 15; all-gather 60 ms, this 14; on 4 ranks 75 against
    18 and 50 against 19.
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
    for step in range(1, axis.size):
        work.append(dist.irecv(received[step - 1], group=axis.group, group_src=(axis.rank - step) % axis.size))
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
    for step in range(1, axis.size):
        peer = (axis.rank - step) % axis.size
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


def slice_dim0(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's equal part of dim 0, as a view."""
    size = tensor.shape[0] // axis.size
    return tensor.narrow(0, axis.rank * size, size)


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(grads[0].clone(memory_format=torch.contiguous_format), ctx.axis), None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        return all_reduce(tensor.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return gather_dim0(tensor, axis).wait()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return scatter_sum_dim0(grads[0], ctx.axis).wait(), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return scatter_sum_dim0(tensor, axis).wait()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather_dim0(grads[0], ctx.axis).wait(), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return slice_dim0(tensor, axis).clone()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather_dim0(grads[0], ctx.axis).wait(), None


def copy_to_region(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Enter a tensor-parallel region: every rank has the same tensor, and gradients from all ranks add up."""
    return tensor if axis.group is None else _CopyToRegion.apply(tensor, axis)


def reduce_from_region(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Leave a tensor-parallel region: the partial results of all ranks add up, and every rank has the sum."""
    return tensor if axis.group is None else _ReduceFromRegion.apply(tensor, axis)


def gather_sequence(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """``[s / tp, b, h] -> [s, b, h]``: leave a sequence-parallel region for a tensor-parallel one."""
    return tensor if axis.group is None else _GatherSequence.apply(tensor, axis)


def reduce_scatter_sequence(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """``[s, b, h] partial -> [s / tp, b, h]`` summed: enter a sequence-parallel region."""
    return tensor if axis.group is None else _ReduceScatterSequence.apply(tensor, axis)


def scatter_sequence(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """``[s, b, h]`` equal on all ranks ``-> [s / tp, b, h]``: enter a sequence-parallel region without a sum."""
    return tensor if axis.group is None else _ScatterSequence.apply(tensor, axis)
