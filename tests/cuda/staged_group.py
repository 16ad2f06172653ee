"""A process group for several ranks on one GPU, where NCCL refuses them: tensors travel through the host, over gloo.

Importing this module registers the backend ``staged``. It is as asynchronous as NCCL, and stricter: an operation takes
its inputs when it is called, a floating-point output is NaN from then on, and the result is there after ``wait()``
alone. So whatever reads too early is wrong in every run, not in a few. After each wait a GPU is kept behind the host,
so that a side stream which does not wait for the compute stream is wrong too.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "staged"
LAG = 1_000_000
"""Cycles that a GPU's compute stream does nothing after a result has come: half a millisecond."""


class StagedWork(dist.Work):
    """``staging`` are pairs of a tensor and its counterpart on the host, which ``work`` fills.

    Tensors are written through ``.data``: autograd does not count what NCCL writes either.
    """

    def __init__(self, work: dist.Work, staging: Sequence[tuple[Tensor, Tensor]] = ()):
        super().__init__()
        self._work = work
        self._staging = list(staging)
        for tensor, _ in self._staging:
            if tensor.is_floating_point():
                tensor.data.fill_(torch.nan)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._work.wait()
        # Once: after the first wait the tensors belong to the caller again.
        staging, self._staging = self._staging, []
        for tensor, host in staging:
            tensor.data.copy_(host)
        if any(tensor.is_cuda for tensor, _ in staging):
            torch.cuda._sleep(LAG)
        return True


def _taken(tensor: Tensor) -> Tensor:
    """What the tensor holds now, on the host: after all that its device has been asked to do before."""
    return _room_for(tensor).copy_(tensor.detach())


def _room_for(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


class StagedGroup(dist.ProcessGroup):
    """The operations that megatron_ds uses; torch calls these methods from ``torch.distributed``'s functions."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        # A group keeps its name in its backends, and a device mesh asks for it.
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, self._gloo)

    def getBackendName(self) -> str:  # noqa: N802  (torch's name)
        return BACKEND

    def allreduce(self, tensors: list[Tensor], opts: dist.AllreduceOptions) -> dist.Work:
        hosts = [_taken(tensor) for tensor in tensors]
        return StagedWork(self._gloo.allreduce(hosts, opts), list(zip(tensors, hosts)))

    def broadcast(self, tensors: list[Tensor], opts: dist.BroadcastOptions) -> dist.Work:
        hosts = [_taken(tensor) for tensor in tensors]
        return StagedWork(self._gloo.broadcast(hosts, opts), list(zip(tensors, hosts)))

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> dist.Work:
        hosts = [[_room_for(tensor) for tensor in row] for row in outputs]
        work = self._gloo.allgather(hosts, [_taken(tensor) for tensor in inputs], opts)
        return StagedWork(work, [pair for row, host in zip(outputs, hosts) for pair in zip(row, host)])

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any) -> dist.Work:
        host = _room_for(output)
        return StagedWork(self._gloo._allgather_base(host, _taken(input), opts), [(output, host)])

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any) -> dist.Work:
        host = _room_for(output)
        return StagedWork(self._gloo._reduce_scatter_base(host, _taken(input), opts), [(output, host)])

    # What the two are called before torch 2.13.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single

    def send(self, tensors: list[Tensor], target: int, tag: int) -> dist.Work:
        return StagedWork(self._gloo.send([_taken(tensor) for tensor in tensors], target, tag))

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> dist.Work:
        hosts = [_room_for(tensor) for tensor in tensors]
        return StagedWork(self._gloo.recv(hosts, source, tag), list(zip(tensors, hosts)))

    def barrier(self, opts: dist.BarrierOptions) -> dist.Work:
        return StagedWork(self._gloo.barrier(opts))


dist.Backend.register_backend(BACKEND, StagedGroup, devices=["cpu", "cuda"])
