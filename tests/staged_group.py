"""A process group for several ranks on one GPU, which NCCL refuses: tensors of any device travel through host memory.

What a collective writes is void from its start to its ``wait()``: NaN, or the least integer. So whatever reads a result
too early computes nonsense, and ``wait()`` raises where somebody wrote into a tensor of the collective meanwhile; under
NCCL both would only sometimes show. Host tensors go the same way, so that all of this is tried without a GPU too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, BarrierOptions

NAME = "staged"


def on_staged_group(device: str, function: Callable[..., Any], *args: Any) -> Any:
    """On a rank of ``run_ranks``: ``function(*args)`` in a job whose group is this one and whose device is shared.

    ``function``'s module asks ``device_of_rank`` for its device.
    """
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    rank, world, store = dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store()
    first = dist.group.WORLD  # kept, and its connections with it: a peer may still be busy connecting
    dist.destroy_process_group()
    dist.Backend.register_backend(NAME, StagedGroup, devices=["cpu", "cuda"])
    dist.init_process_group(NAME, store=dist.PrefixStore(NAME, store), rank=rank, world_size=world)
    assert first is not None and isinstance(dist.group.WORLD, StagedGroup)
    with patch.dict(function.__globals__, device_of_rank=lambda rank, world: place):
        return function(*args)


class StagedGroup(dist.ProcessGroup):
    """Each method is what ``torch.distributed`` calls of a group; those of torch 2.11 and 2.13 differ in two names."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)
        self._rank, self._size = rank, size
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def allreduce(self, tensors: Sequence[Tensor], options: Any = None) -> dist.Work:
        (tensor,) = tensors
        sent = host_copy(tensor)
        work = self._gloo.allreduce([sent], options or AllreduceOptions())
        return StagedWork(work, [Written(tensor, lambda: sent)])

    def broadcast(self, tensors: Sequence[Tensor], options: Any) -> dist.Work:
        (tensor,) = tensors
        sent = host_copy(tensor)
        work = self._gloo.broadcast([sent], options)
        if options.rootRank == self._rank:
            return StagedWork(work, [Read(tensor)])
        return StagedWork(work, [Written(tensor, lambda: sent)])

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, options: Any) -> dist.Work:
        sent, before = host_copy(whole), host_copy(whole)
        sums = AllreduceOptions()
        sums.reduceOp = options.reduceOp
        work = self._gloo.allreduce([sent], sums)
        own = sent.view(self._size, -1)[self._rank]
        if overlap(output, whole):
            # The rest of the buffer is what it was, but may not be touched while the collective is under way.
            before.view(self._size, -1)[self._rank].zero_()

            def after() -> Tensor:
                before.view(self._size, -1)[self._rank].copy_(own)
                return before

            return StagedWork(work, [Written(whole, after)])
        return StagedWork(work, [Read(whole), Written(output, lambda: own)])

    def all_gather_single(self, output: Tensor, tensor: Tensor, options: Any) -> dist.Work:
        sent = host_copy(tensor).view(-1)
        received = [torch.empty_like(sent) for _ in range(self._size)]
        work = self._gloo.allgather([received], [sent], AllgatherOptions())
        parts = output.view(self._size, -1)
        uses: list[Read | Written] = [Read(tensor)]
        for rank, part in enumerate(parts):
            if not overlap(part, tensor):
                uses.append(Written(part, lambda rank=rank: received[rank]))
        return StagedWork(work, uses)

    _reduce_scatter_base = reduce_scatter_single
    _allgather_base = all_gather_single

    def allgather(self, outputs: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor], options: Any) -> dist.Work:
        sent = host_copy(tensors[0])
        received = [torch.empty_like(sent) for _ in range(self._size)]
        work = self._gloo.allgather([received], [sent], AllgatherOptions())
        uses = [Written(output, lambda rank=rank: received[rank]) for rank, output in enumerate(outputs[0])]
        return StagedWork(work, [Read(tensors[0]), *uses])

    def send(self, tensors: Sequence[Tensor], target: int, tag: int) -> dist.Work:
        sent = host_copy(tensors[0])
        return StagedWork(self._gloo.send([sent], target, tag), [Read(tensors[0])], sent)

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int) -> dist.Work:
        received = torch.empty(tensors[0].shape, dtype=tensors[0].dtype)
        work = self._gloo.recv([received], source, tag)
        return StagedWork(work, [Written(tensors[0], lambda: received)])

    def barrier(self, opts: Any = None) -> dist.Work:
        work = self._gloo.barrier(BarrierOptions())
        return StagedWork(work, [])

    # torch keeps the name in a group's backends, of which this one has none.

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> str:
        return self._name

    def getBackendName(self) -> str:  # noqa: N802  (torch's own name)
        return NAME


class Read:
    """A tensor that the collective reads until its ``wait()``."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.before = tensor.detach(), host_copy(tensor)

    def finish(self) -> None:
        if not same_bits(host_copy(self.tensor), self.before):
            raise AssertionError(f"a tensor of shape {list(self.tensor.shape)} changed while a collective read it")


class Written:
    """A tensor that the collective writes; ``result`` gives what, in host memory."""

    def __init__(self, tensor: Tensor, result: Callable[[], Tensor]):
        self.tensor, self.result = tensor.detach(), result
        self.tensor.fill_(void_of(tensor.dtype))

    def finish(self) -> None:
        void = torch.full(self.tensor.shape, void_of(self.tensor.dtype), dtype=self.tensor.dtype)
        if not same_bits(host_copy(self.tensor), void):
            raise AssertionError(
                f"a tensor of shape {list(self.tensor.shape)} was written while a collective was at it"
            )
        self.tensor.copy_(self.result().view(self.tensor.shape))


class StagedWork(dist.Work):
    """gloo's work on the copies; the first ``wait()`` brings the results."""

    def __init__(self, work: dist.Work, uses: Sequence[Read | Written], *alive: Tensor):
        super().__init__()
        self._work, self._uses, self._alive = work, list(uses), alive

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._work.wait()
        uses, self._uses = self._uses, []
        for use in uses:
            use.finish()
        return True

    def is_completed(self) -> bool:
        return not self._uses


def host_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy in host memory of what all queued work leaves in ``tensor``."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two contiguous tensors share memory."""

    def span(tensor: Tensor) -> tuple[int, int]:
        return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()

    (a, b), (c, d) = span(first), span(second)
    return a < d and c < b


def void_of(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else int(torch.iinfo(dtype).min)


def same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(-1).view(torch.uint8), second.view(-1).view(torch.uint8))
