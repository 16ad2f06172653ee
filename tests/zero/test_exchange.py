"""Large CPU collectives, sent from rank to rank or read from shared memory, against gloo's all-reduce."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ds import comm
from megatron_ds.comm import BufferSizes, collectives, open_buffers
from megatron_ds.comm.local.arena import SharedArena
from megatron_ds.comm.local.shared_buffers import LocalBuffers
from megatron_ds.comm.local.tokens import Tokens
from megatron_ds.mesh import Axis, Mesh, MeshShape
from megatron_ds.testing import run_ranks


def data_axis() -> Axis:
    return Mesh.create(MeshShape(dp=dist.get_world_size()), torch.device("cpu")).data


def values(rank: int, numel: int) -> torch.Tensor:
    return torch.arange(numel, dtype=torch.float64).mul_(rank + 1).remainder_(1009)


def exchange(numel: int, in_place: bool) -> tuple[bool, bool, bool]:
    axis = data_axis()
    tensor = values(axis.rank, numel)
    assert collectives._prefers_exchange(tensor, axis)
    want = sum((values(rank, numel) for rank in range(axis.size)), torch.zeros(numel, dtype=torch.float64))
    part = comm.slice_dim0(tensor, axis)
    output = part if in_place else torch.empty_like(part)
    before = tensor.clone()
    got = comm.reduce_scatter_start(output, tensor, axis).wait()
    untouched = in_place or torch.equal(tensor, before)
    summed = got is output and torch.equal(output, comm.slice_dim0(want, axis))
    whole = torch.empty_like(tensor)
    source = comm.slice_dim0(whole, axis).copy_(output) if in_place else output
    gathered = comm.all_gather_start(whole, source, axis).wait()
    return summed, untouched, gathered is whole and torch.equal(whole, want)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_rank_to_rank_exchange(world_size: int, in_place: bool) -> None:
    assert run_ranks(exchange, world_size, world_size * 70_001, in_place) == [(True, True, True)] * world_size


def shared_rounds(sizes: list[int]) -> bool:
    """Several rounds over several buffers, each rank late in turn, must equal the sums of a private copy."""
    axis = data_axis()
    dtypes = (torch.float64, torch.float32)
    memory = open_buffers(axis, torch.device("cpu"), BufferSizes(whole=list(zip(sizes, dtypes))))
    assert isinstance(memory, LocalBuffers)
    buffers = [memory.whole(size, dtype) for size, dtype in zip(sizes, dtypes)]
    assert not any(buffer.whole.any() for buffer in buffers)
    readers: list[Tokens] = []
    for round_ in range(6):
        for tokens in readers:
            tokens.wait()
        for buffer in buffers:
            buffer.whole.copy_(values(axis.rank + round_, buffer.whole.numel()))
        if round_ % axis.size == axis.rank:
            time.sleep(0.05)
        pending = [buffer.reduce_scatter_start() for buffer in buffers]
        for waiting in pending:
            waiting.wait()
        readers = [memory._arena.tokens()]
        for buffer in buffers:
            numel = buffer.whole.numel()
            want = sum((values(rank + round_, numel) for rank in range(axis.size)), torch.zeros(numel).double())
            if not torch.equal(comm.slice_dim0(buffer.whole, axis).double(), comm.slice_dim0(want, axis)):
                return False
            pending_gather = buffer.all_gather_start()
            memory.meet()  # each rank's slice is what it will be
            pending_gather.wait()
            if not torch.equal(buffer.whole.double(), want):
                return False
        readers.append(memory._arena.tokens())
    for tokens in readers:
        tokens.wait()
    return True


@pytest.mark.parametrize("world_size", [2, 4])
def test_shared_buffers_never_show_a_round_too_early_or_too_late(world_size: int) -> None:
    sizes = [world_size * 70_000, world_size * 3]
    assert run_ranks(shared_rounds, world_size, sizes, apart=False) == [True] * world_size


def refused(how: str) -> Any:
    axis = data_axis()
    if how == "memory":  # one rank's host is full
        nbytes = 1 << 60 if axis.rank == 1 else 1 << 16
    else:  # one rank's process id means something else here, as between two containers
        nbytes = 1 << 16
        if axis.rank == 1:
            os.getpid = os.getppid
    return SharedArena.create(nbytes, axis), open_arenas()


def open_arenas() -> int:
    """Descriptors of arenas alone: gloo opens and closes sockets of its own at times that are not ours."""
    arenas = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            arenas += "megatron-ds" in os.readlink(f"/proc/self/fd/{descriptor}")
    return arenas


@pytest.mark.parametrize("how", ["memory", "stranger"])
def test_all_ranks_alike_do_without_memory_that_one_cannot_share(how: str) -> None:
    assert run_ranks(refused, 3, how) == [(None, 0)] * 3


def taken() -> None:
    arena = SharedArena.create(4096, data_axis())
    assert arena is not None
    arena.take(512, torch.float64)
    arena.take(1, torch.float32)


def test_an_arena_gives_no_more_than_it_has() -> None:
    with pytest.raises(AssertionError, match="the arena has 4096 bytes, 8192 were asked for"):
        run_ranks(taken, 2, apart=False)
