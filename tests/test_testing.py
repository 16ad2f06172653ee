"""The multi-rank helper itself: results in order, the culprit first, nobody left waiting."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from megatron_ds.comm import local
from megatron_ds.comm.local.arena import SharedArena
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.testing import RankFailed, run_ranks

pytestmark = pytest.mark.alone


def total_of_ranks() -> tuple[int, float]:
    tensor = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(tensor)
    return dist.get_rank(), tensor.item()


def fail_on(bad: int, how: str) -> None:
    if dist.get_rank() == bad:
        if how == "die":
            os._exit(7)
        if how == "hang":
            time.sleep(60)
        raise ValueError(f"deliberate fault on rank {bad}")
    dist.barrier()


def test_every_rank_reports_in_order() -> None:
    assert run_ranks(total_of_ranks, 4) == [(rank, 6.0) for rank in range(4)]


def test_the_failing_rank_is_named_first() -> None:
    with pytest.raises(RankFailed, match=r"rank 2 of 3 failed first:\nTraceback[\s\S]*deliberate fault on rank 2"):
        run_ranks(fail_on, 3, 2, "raise")


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RankFailed, match=r"rank 1 of 3 failed first:\ndied without a traceback, exit code 7"):
        run_ranks(fail_on, 3, 1, "die")


def test_a_hang_ends_at_the_time_limit_with_stacks() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match=r"did not finish in 4 s[\s\S]*was at:"):
        run_ranks(fail_on, 2, 0, "hang", timeout=4.0)
    assert time.monotonic() - start < 20


def nothing() -> None:
    pass


def test_ranks_that_end_at_once_leave_the_others_their_connections() -> None:
    for _ in range(3):
        assert run_ranks(nothing, 8) == [None] * 8


def shares_memory() -> bool:
    mesh = Mesh.create(MeshShape(dp=dist.get_world_size()), torch.device("cpu"))
    return SharedArena.create(1, mesh.data) is not None and local._exchange_on(mesh.data) is not None


@pytest.mark.parametrize("apart", [False, True])
def test_ranks_share_memory_or_not(apart: bool) -> None:
    assert run_ranks(shares_memory, 2, apart=apart) == [not apart] * 2
