"""Collectives between layers through shared memory: nothing is read too early, and nothing is overwritten too soon."""

from __future__ import annotations

import math
import mmap
import os
import random
import struct
import time
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ds import comm
from megatron_ds.comm import Pending, local
from megatron_ds.comm.local.arena import PrivateView, SharedArena
from megatron_ds.comm.local.exchange import LocalExchange
from megatron_ds.mesh import Axis, Mesh, MeshShape
from megatron_ds.testing import run_ranks

COLUMNS = 4100  # with several rows, longer than what is added at a time


def tp_axis() -> Axis:
    return Mesh.create(MeshShape(tp=dist.get_world_size()), torch.device("cpu")).tp


def exchange_of(axis: Axis) -> LocalExchange:
    found = local._exchange_on(axis)
    assert found is not None
    return found


def values(number: int, rank: int, rows: int) -> torch.Tensor:
    return (torch.arange(rows * COLUMNS) * (rank + 1) + number).remainder(1009).double().view(rows, COLUMNS)


def start(kind: str, number: int, rows: int, axis: Axis) -> tuple[Pending, torch.Tensor]:
    """A collective that has begun, and its result by definition. ``rows`` is a multiple of the axis."""
    everyone = [values(number, rank, rows) for rank in range(axis.size)]
    own = everyone[axis.rank]
    total = torch.stack(everyone).sum(0)
    if kind == "sum":
        return comm.all_reduce_start(own, axis), total
    if kind == "scatter":
        return comm.scatter_sum_dim0(own, axis), comm.slice_dim0(total, axis)
    part = own[: rows // axis.size]
    return comm.gather_dim0(part, axis), torch.cat([t[: rows // axis.size] for t in everyone])


def many() -> int:
    """Random collectives of random sizes, some of which wait while others come and go, each rank late in turn."""
    axis = tp_axis()
    program = random.Random(7)  # the same on every rank
    waiting: list[tuple[Pending, torch.Tensor]] = []
    for number in range(120):
        kind = program.choice(("sum", "scatter", "gather"))
        waiting.append(start(kind, number, program.choice((1, 5, 20)) * axis.size, axis))
        if number % (2 * axis.size) == axis.rank:
            time.sleep(0.01)
        while len(waiting) > program.choice((0, 0, 1, 4)):
            pending, want = waiting.pop(program.randrange(len(waiting)))
            assert torch.equal(pending.wait(), want), (kind, number)
    for pending, want in waiting:
        assert torch.equal(pending.wait(), want)
    return exchange_of(axis)._started


@pytest.mark.parametrize("ranks", [2, 3])
def test_results_are_right_whatever_is_under_way_and_whoever_is_late(ranks: int) -> None:
    with_slot = run_ranks(many, ranks)
    # Most of them found a slot, but not all: at times more are under way than there are slots.
    assert len(set(with_slot)) == 1 and 60 < with_slot[0] < 120


def few_numbers() -> list[list[float]]:
    """Sums of so few numbers that the tokens carry them; several under way, waited for in the other order."""
    axis = tp_axis()
    inf, nan, tiny = float("inf"), float("nan"), 5e-324
    tensors = [
        torch.tensor(0.1 * (axis.rank + 1), dtype=torch.float64),
        torch.tensor([[1e308, 7, inf], [tiny, 7, nan if axis.rank == 1 else 1]], dtype=torch.float64)[:, ::2],
        torch.arange(8).double() - 3.5 * axis.rank,
    ]
    refuse = AssertionError("the group was asked")
    comm.all_reduce(torch.zeros(1, dtype=torch.float64), axis)  # the first one asks whether there can be tokens
    with patch.object(dist, "all_reduce", side_effect=refuse):
        pending = [comm.all_reduce_start(tensor, axis) for tensor in tensors]
        for work, tensor in zip(pending[::-1], tensors[::-1]):
            assert work.wait() is tensor
    return [tensor.flatten().tolist() for tensor in tensors]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_few_numbers_go_as_tokens_in_all_their_bits(ranks: int) -> None:
    everyone = run_ranks(few_numbers, ranks)
    scalar, strided, row = everyone[0]
    total = 0.0
    for rank in range(ranks):
        total += 0.1 * (rank + 1)
    assert scalar == [total]
    assert strided[:2] == [float("inf"), float("inf")] and strided[2] == ranks * 5e-324 and math.isnan(strided[3])
    assert row == [ranks * i - 3.5 * sum(range(ranks)) for i in range(8)]
    bits = {struct.pack("<13d", *scalar, *strided, *row) for scalar, strided, row in everyone}
    assert len(bits) == 1


def one_after_the_other() -> tuple[int, int]:
    axis = tp_axis()
    for number in range(20):
        pending, want = start("sum", number, 8, axis)
        assert torch.equal(pending.wait(), want)
    for size in range(1, 100):  # of many sizes, which share slots
        small = torch.ones(size)
        comm.all_reduce(small, axis)
        assert torch.equal(small, torch.full((size,), 2.0))
    return exchange_of(axis)._started, len(exchange_of(axis)._slots)


def test_what_is_never_under_way_together_always_finds_a_slot() -> None:
    assert run_ranks(one_after_the_other, 2) == [(119, 3)] * 2


def without_memory() -> int:
    axis = tp_axis()
    with patch.object(SharedArena, "create", lambda nbytes, axis: None):
        for number in range(3):
            pending, want = start("sum", number, 4 * (number + 1), axis)
            assert torch.equal(pending.wait(), want)
    return exchange_of(axis)._started


def test_where_the_host_cannot_share_memory_the_group_does_it() -> None:
    assert run_ranks(without_memory, 2) == [0, 0]


def test_a_private_view_tells_what_was_written_without_an_operator() -> None:
    """It is asked whenever a unit of stage 3 is freed."""

    class Operators(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    size = 5 * mmap.PAGESIZE
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, size)
    common = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    pages = mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE)
    view = PrivateView(pages, torch.frombuffer(pages, dtype=torch.uint8))
    os.close(descriptor)
    with Operators() as operators:
        assert not view.written()
    common[3 * mmap.PAGESIZE] = 4
    assert view.tensor.sum() == 4 and not view.written()  # every page is looked at
    view.tensor[-1] = 5
    with operators:
        operators.count = 0
        assert view.written() and operators.count == 0
    assert common.sum() == 4
    view.forget()
    assert not view.written() and view.tensor.sum() == 4 and not view.written()
