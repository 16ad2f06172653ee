"""The group that tests several ranks on one GPU: right when it is waited for, and wrong for whoever does not wait."""

from __future__ import annotations

import pytest
import staged_group
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds import comm
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.testing import run_ranks

DEVICES = [
    "cpu",
    pytest.param(
        "cuda:0",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
ROWS, COLUMNS = 4, 3


def values(rank: int, device: str) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(device)


def in_flight(pending: comm.Pending, output: Tensor, source: Tensor) -> Tensor:
    """The result; before it is waited for nothing of it is to be seen, and the source may be written."""
    assert output.isnan().all()
    if source.data_ptr() != output.data_ptr():
        source.fill_(-1.0)
    return pending.wait()


def operations(device: str) -> str:
    axis = Mesh.create(MeshShape(dp=2), torch.device(device)).data
    assert dist.get_backend(axis.group) == staged_group.BACKEND
    everyone = [values(rank, device) for rank in range(2)]
    own, total = everyone[axis.rank], everyone[0] + everyone[1]
    half = slice(axis.rank * 2, axis.rank * 2 + 2)

    tensor = own.clone()
    assert torch.equal(in_flight(comm.all_reduce_start(tensor, axis), tensor, tensor), total)
    assert torch.equal(comm.all_reduce(own.clone(), axis, dist.ReduceOp.MAX), torch.maximum(*everyone))
    assert torch.equal(comm.broadcast(own.clone(), axis), everyone[0])

    tensor, output = own.clone(), torch.zeros_like(own[half])
    assert torch.equal(in_flight(comm.reduce_scatter_start(output, tensor, axis), output, tensor), total[half])
    tensor, output = own.clone(), own.new_zeros(2 * ROWS, COLUMNS)
    assert torch.equal(in_flight(comm.all_gather_start(output, tensor, axis), output, tensor), torch.cat(everyone))
    # In place: the rank's slice of one tensor is the other.
    tensor = own.clone()
    assert torch.equal(comm.reduce_scatter_start(tensor[half], tensor, axis).wait(), total[half])
    want = torch.cat([everyone[0][:2], everyone[1][2:]])
    tensor = own.clone()
    assert torch.equal(comm.all_gather_start(tensor, tensor[half], axis).wait(), want)

    # Two transfers each way at once, waited for in another order.
    peer, sent = 1 - axis.rank, [own.clone(), own * 2]
    received = [torch.zeros_like(own) for _ in sent]
    receiving = [dist.irecv(tensor, peer, group=axis.group) for tensor in received]
    sending = [dist.isend(tensor, peer, group=axis.group) for tensor in sent]
    for tensor in sent:
        tensor.fill_(-1.0)
    assert all(tensor.isnan().all() for tensor in received)
    for work in (*reversed(receiving), *sending):
        work.wait()
    assert all(torch.equal(got, factor * everyone[peer]) for factor, got in zip((1, 2), received))

    objects = [None, None]
    dist.all_gather_object(objects, {"rank": axis.rank}, group=axis.group)
    assert objects == [{"rank": 0}, {"rank": 1}]
    dist.barrier(group=axis.group)

    whole = torch.full((2,), float(axis.rank), device=device, dtype=torch.bfloat16)
    assert comm.all_reduce(whole, axis).tolist() == [1.0, 1.0]
    counts = torch.tensor([axis.rank + 1], device=device)
    assert comm.all_reduce(counts, axis).tolist() == [3]
    return tensor.device.type


@pytest.mark.parametrize("device", DEVICES)
def test_a_result_is_there_once_it_is_waited_for(device: str) -> None:
    found = run_ranks(operations, 2, device, backend=staged_group.BACKEND, device=device)
    assert found == [torch.device(device).type] * 2


def counted_by_autograd(device: str) -> float:
    """A buffer that a graph has saved may be gathered again, as with NCCL: stage 3 does so between its two passes."""
    axis = Mesh.create(MeshShape(dp=2), torch.device(device)).data
    whole = torch.zeros(2, device=device)
    part = torch.full((1,), axis.rank + 1.0, device=device)
    comm.all_gather_start(whole, part, axis).wait()
    x = torch.ones(2, device=device, requires_grad=True)
    loss = (x * whole).sum()
    comm.all_gather_start(whole, part, axis).wait()
    loss.backward()
    assert x.grad is not None
    return x.grad.sum().item()


@pytest.mark.parametrize("device", DEVICES)
def test_autograd_does_not_count_what_it_writes(device: str) -> None:
    assert run_ranks(counted_by_autograd, 2, device, backend=staged_group.BACKEND, device=device) == [3.0, 3.0]
