"""Tokens between ranks of one host: none is lost, mixed up, or waited for in vain."""

from __future__ import annotations

import gc
import os
import random
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ds.comm.local.arena import SharedArena
from megatron_ds.comm.local.tokens import Tokens
from megatron_ds.mesh import Axis, Mesh, MeshShape
from megatron_ds.testing import run_ranks


def data_axis(timeout: float | None = None) -> Axis:
    return Mesh.create(MeshShape(dp=dist.get_world_size()), torch.device("cpu"), timeout).data


def arena_on(axis: Axis, common: int = 0) -> SharedArena:
    arena = SharedArena.create(4096, axis, common=common)
    assert arena is not None
    return arena


def numbered() -> bool:
    """Each token carries rank and number; several are under way, waited for in any order, by ranks that come late."""
    axis = data_axis()
    arena, program = arena_on(axis), random.Random(axis.rank)
    waiting: list[tuple[int, Tokens]] = []
    for number in range(300):
        waiting.append((number, arena.tokens(1000 * number + axis.rank)))
        if program.random() < 0.02:
            time.sleep(0.005)
        while len(waiting) > 20 or (waiting and program.random() < 0.5):
            which, tokens = waiting.pop(program.randrange(len(waiting)))
            expected = [1000 * which + rank for rank in range(axis.size)]
            assert tokens.wait() == expected
            assert tokens.wait() == expected, "asked again"
    for which, tokens in waiting:
        assert tokens.wait() == [1000 * which + rank for rank in range(axis.size)]
    return True


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_token_reaches_every_rank_with_its_number(ranks: int) -> None:
    assert run_ranks(numbered, ranks) == [True] * ranks


def far_ahead() -> list[int]:
    """Rank 0 sends more than a pipe holds before rank 1 reads the first."""
    axis = data_axis()
    arena, count = arena_on(axis), 20_000
    if axis.rank == 1:
        time.sleep(0.3)
        received = [arena.tokens(-number).wait()[0] for number in range(count)]
    else:
        received = [tokens.wait()[1] for tokens in [arena.tokens(number) for number in range(count)]]
    dist.barrier()
    return received


def test_a_rank_that_is_far_ahead_waits_instead_of_losing_tokens() -> None:
    first, second = run_ranks(far_ahead, 2)
    assert second == list(range(20_000)) and first == [-number for number in range(20_000)]


def bereaved(last_token: bool, folder: str) -> None:
    """Rank 1 ends by a signal; rank 0 has its last token, if it sent one, and is told when it waits for another."""
    axis = data_axis()
    arena = arena_on(axis)
    if axis.rank == 1:
        if last_token:
            arena.tokens(5)
        os.kill(os.getpid(), signal.SIGKILL)
    if last_token:
        assert arena.tokens().wait() == [0, 5]
    start = time.monotonic()
    try:
        arena.tokens().wait()
    except RuntimeError as error:
        Path(folder, "error").write_text(f"{time.monotonic() - start:.1f} {error}")
    time.sleep(5)  # long enough for what starts the ranks to see which of them died


@pytest.mark.parametrize("last_token", [True, False])
def test_the_death_of_a_peer_ends_the_wait_for_it(last_token: bool, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="rank 1"):
        run_ranks(bereaved, 2, last_token, str(tmp_path))
    seconds, error = (tmp_path / "error").read_text().split(" ", 1)
    assert error == "connection closed by rank 1 of the data axis"
    assert float(seconds) < 5


def impatient() -> str:
    axis = data_axis()
    arena = arena_on(replace(axis, timeout=0.2))
    error = ""
    if axis.rank == 0:
        try:
            arena.tokens().wait()
        except RuntimeError as caught:
            error = str(caught)
    dist.barrier()
    return error


def test_a_peer_that_does_not_come_is_waited_for_as_long_as_the_axis_says() -> None:
    assert run_ranks(impatient, 2)[0] == "timed out after 0.2 s: rank 1 of the data axis has not come"


def pipes() -> int:
    return sum(os.readlink(f"/proc/self/fd/{fd}").startswith(("pipe:", "/memfd:megatron")) for fd in open_descriptors())


def open_descriptors() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if Path("/proc/self/fd", fd).is_symlink()]


def opened_and_dropped() -> tuple[int, int]:
    axis = data_axis()
    dist.barrier()
    before = pipes()
    arena = arena_on(axis, common=8192)
    shared, view = arena.take_common(100, torch.float32)
    during = pipes() - before
    dist.barrier()
    del arena
    gc.collect()
    assert not view.tensor.any() and not shared.any(), "what was taken stays"
    return during, pipes() - before


def test_an_arena_that_is_dropped_leaves_no_descriptor() -> None:
    # A pipe to and from each of two peers, three ranks' memory, and one more for each of the four places it is mapped
    # at: of those, the one that is in use and its private view stay.
    assert run_ranks(opened_and_dropped, 3) == [(4 + 3 + 4, 2)] * 3


def without_descriptors() -> tuple[bool, int]:
    """Rank 1 may open no more files: all ranks do without shared memory, and nothing is left open."""
    axis = data_axis()
    dist.barrier()
    before = pipes()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if axis.rank == 1:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 3, limits[1]))
    arena = SharedArena.create(4096, axis)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    return arena is None, pipes() - before


def test_a_rank_that_may_open_no_more_files_is_no_reason_to_hang() -> None:
    assert run_ranks(without_descriptors, 3) == [(True, 0)] * 3


def looks(of_rank: int) -> dict[str, object]:
    """Two views of common memory: writes to the private one are seen by nobody and forgotten, the others by all."""
    axis = data_axis()
    arena, numel = arena_on(axis, common=1 << 20), 100_000
    shared, view = arena.take_common(numel, torch.float32)
    part = slice(axis.rank * numel // 2, (axis.rank + 1) * numel // 2)
    shared[part] = axis.rank + 1.0
    arena.tokens().wait()
    seen: dict[str, object] = {"first": sorted(set(view.tensor.tolist()))}
    arena.tokens().wait()
    if axis.rank == of_rank:
        view.tensor.mul_(10)
    arena.tokens().wait()
    seen["private"] = sorted(set(view.tensor.tolist()))
    seen["shared"] = sorted(set(shared.tolist()))
    arena.tokens().wait()
    shared[part] += 2
    arena.tokens().wait()
    seen["before"] = sorted(set(view.tensor.tolist()))
    view.forget()
    seen["forgotten"] = sorted(set(view.tensor.tolist()))
    arena.tokens().wait()
    return seen


@pytest.mark.parametrize("of_rank", [0, 1])
def test_a_private_view_shows_common_memory_until_it_is_written(of_rank: int) -> None:
    for rank, seen in enumerate(run_ranks(looks, 2, of_rank)):
        mine = rank == of_rank
        assert seen == {
            "first": [1.0, 2.0],
            "private": [10.0, 20.0] if mine else [1.0, 2.0],
            "shared": [1.0, 2.0],
            "before": [10.0, 20.0] if mine else [3.0, 4.0],
            "forgotten": [3.0, 4.0],
        }


def resident() -> tuple[int, int, int]:
    """MiB that a private view of 64 MiB adds to this process: unseen, seen, and forgotten."""
    axis = data_axis()
    arena = arena_on(axis, common=64 << 20)
    shared, view = arena.take_common(16 << 20, torch.float32)
    if axis.rank == 0:
        shared.fill_(1.0)
    arena.tokens().wait()
    before = rss()
    assert view.tensor.sum() == 16 << 20 if axis.rank == 1 else True
    seen = rss()
    view.forget()
    return 0, seen - before, rss() - before


def rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def test_pages_count_as_a_rank_s_memory_only_while_it_looks_at_them() -> None:
    _, seen, forgotten = run_ranks(resident, 2)[1]
    assert seen >= 60 and forgotten <= 2
