"""The process group that tests use for several ranks on one GPU: right sums, and no result before its ``wait()``."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from staged_group import on_staged_group

from megatron_ds import comm
from megatron_ds.checkpoint.together import exchange
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.testing import device_of_rank, run_ranks

WORLD = 4
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def collectives() -> list[float]:
    """On a rank of a 2 x 2 mesh: every collective of ``comm`` on its axes. Returns sums that all ranks must know."""
    device = device_of_rank(dist.get_rank(), WORLD)
    mesh = Mesh.create(MeshShape(dp=2, tp=2), device)
    assert dist.get_backend(mesh.data.group) == "staged" and mesh.data.size == mesh.tp.size == 2
    rank = float(mesh.rank)

    def full(value: float, *shape: int) -> torch.Tensor:
        return torch.full(shape, value, device=device, dtype=torch.float64)

    tensor = full(rank, 3)
    pending = comm.all_reduce_start(tensor, mesh.world)
    assert tensor.isnan().all(), "a result is there before it is waited for"
    assert pending.wait().tolist() == [6.0] * 3

    whole = torch.arange(4.0, device=device, dtype=torch.float64) + rank
    kept = whole.clone()
    own = comm.slice_dim0(whole, mesh.tp)
    comm.reduce_scatter_start(own, whole, mesh.tp).wait()
    peers = sum(mesh.tp.ranks)
    want = [2.0 * (2 * mesh.tp.rank + i) + peers for i in range(2)]
    assert own.tolist() == want
    other = slice(2 - 2 * mesh.tp.rank, 4 - 2 * mesh.tp.rank)
    assert torch.equal(whole[other], kept[other]), "the rest of the buffer is what it was"
    assert comm.scatter_sum_dim0(kept, mesh.tp).wait().tolist() == want

    gathered = full(0.0, 4)
    comm.slice_dim0(gathered, mesh.data).fill_(rank)
    comm.all_gather_start(gathered, comm.slice_dim0(gathered, mesh.data), mesh.data).wait()
    assert gathered.tolist() == [float(mesh.data.ranks[0])] * 2 + [float(mesh.data.ranks[1])] * 2
    assert comm.gather_dim0(full(rank, 1), mesh.world).wait().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert comm.gather_dim0(torch.tensor([int(rank)], device=device), mesh.world).wait().tolist() == [0, 1, 2, 3]

    assert comm.broadcast(full(rank, 2), mesh.world).tolist() == [0.0, 0.0]
    sent, received = full(rank, 2), full(0.0, 2)
    works = [dist.irecv(received, (mesh.rank - 1) % WORLD), dist.isend(sent, (mesh.rank + 1) % WORLD)]
    for work in works:
        assert work is not None
        work.wait()
    assert received.tolist() == [(rank - 1) % WORLD] * 2
    assert exchange(mesh.world, f"rank {mesh.rank}") == [f"rank {i}" for i in range(WORLD)]
    lists: list[object] = [None] * WORLD
    dist.all_gather_object(lists, {"rank": mesh.rank})
    assert lists == [{"rank": i} for i in range(WORLD)]
    mesh.barrier()
    return gathered.tolist()


def writes_too_early(kind: str) -> str:
    """Change a tensor of a collective that is under way; what ``wait()`` says to it."""
    device = device_of_rank(dist.get_rank(), dist.get_world_size())
    mesh = Mesh.create(MeshShape(dp=dist.get_world_size()), device)
    read, written = torch.ones(2, device=device), torch.zeros(4, device=device)
    pending = comm.all_gather_start(written, read, mesh.data)
    (read if kind == "read" else written).fill_(3.0)
    try:
        pending.wait()
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("device", DEVICES)
def test_collectives_are_right(device: str) -> None:
    results = run_ranks(on_staged_group, WORLD, device, collectives)
    assert len(results) == WORLD and results[0] == results[2] != [] and results[1] == results[3]


@pytest.mark.parametrize(("kind", "said"), [("read", "changed while a collective read it"), ("written", "was written")])
def test_who_writes_while_a_collective_is_under_way_is_told(kind: str, said: str) -> None:
    assert all(said in text for text in run_ranks(on_staged_group, 2, "cpu", writes_too_early, kind))
