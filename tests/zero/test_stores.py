"""The stores against plain tensors: whatever is written comes back, through any bound on memory, in any order."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.comm import Pending
from megatron_ds.errors import OffloadError
from megatron_ds.zero.state import RegionAccess
from megatron_ds.zero.store import DeviceStore, HostStore, NvmeStore, Store, placement
from megatron_ds.zero.store.blocks import BlockPool
from megatron_ds.zero.store.nvme import Phase

CPU = torch.device("cpu")
CHUNK = 1 << 16
BLOCK = BlockPool.cost(4 * 50_000)
"""What a region of 50,000 fp32 elements takes of a bound."""


def make(kind: str, folder: Path, host_bytes: int = 3 * BLOCK, device: torch.device = CPU) -> Store:
    if kind == "nvme":
        return NvmeStore(folder, device, host_bytes, chunk=CHUNK)
    return HostStore(device) if kind == "cpu" else DeviceStore(device)


def check_updates(store: Store, sizes: list[int], dtype: torch.dtype, ahead: int, rounds: int = 3) -> None:
    """Update every region as an optimizer would, ``ahead`` reads ahead, beside tensors that never move."""
    regions = [store.allocate(f"region {i}", size, dtype) for i, size in enumerate(sizes)]
    expected = [torch.zeros(size, dtype=dtype) for size in sizes]
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        coming = [region.read_start() for region in regions[:ahead]]
        for i, region in enumerate(regions):
            if i + ahead < len(regions):
                coming.append(regions[i + ahead].read_start())
            tensor = coming[i].wait()
            assert tensor.dtype == dtype and torch.equal(tensor.cpu(), expected[i]), f"region {i}"
            change = torch.randn(sizes[i], generator=generator).to(dtype)
            tensor.add_(change.to(tensor.device))
            expected[i] += change
            region.write_start()
    for i in reversed(range(len(regions))):  # read only, in another order
        assert torch.equal(regions[i].read_start().wait().cpu(), expected[i])
        regions[i].release()
    store.drain()


SIZES = [50_000, 1, 0, 50_000, 16_384, 16_385, 49_999, 33]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["device", "cpu", "nvme"])
def test_what_is_written_comes_back(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    store = make(kind, tmp_path, 3 * BlockPool.cost(8 * 50_000))
    check_updates(store, SIZES, dtype, ahead=1)
    store.close()


@pytest.mark.parametrize(("blocks", "ahead"), [(1, 0), (1, 1), (1, 3), (2, 1), (3, 1), (5, 3)])
def test_memory_stays_under_the_bound_however_much_there_is(tmp_path: Path, blocks: int, ahead: int) -> None:
    """Eight regions through one to five buffers; a bound too small for what is read ahead costs overlap alone."""
    store = NvmeStore(tmp_path, CPU, blocks * BLOCK, chunk=CHUNK)
    check_updates(store, [50_000] * 8, torch.float32, ahead)
    assert store._blocks.total <= blocks * BLOCK
    assert 8 * 200_000 <= store._size <= 8 * (200_000 + 4096)
    store.close()
    assert store._blocks.total == store._size == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["cpu", "nvme"])
def test_regions_travel_to_a_gpu_and_back(tmp_path: Path, kind: str) -> None:
    store = make(kind, tmp_path, device=torch.device("cuda"))
    check_updates(store, [50_000] * 20, torch.float32, ahead=1)
    store.close()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=6), st.integers(0, 3), st.integers(1, 3))
def test_any_sizes_through_any_bound(tmp_path_factory: Any, sizes: list[int], ahead: int, blocks: int) -> None:
    store = NvmeStore(
        tmp_path_factory.mktemp("swap"), CPU, blocks * BlockPool.cost(4 * max(sizes)), threads=3, chunk=8192
    )
    check_updates(store, sizes, torch.float32, ahead, rounds=2)
    assert store._blocks.total <= blocks * BlockPool.cost(4 * max(sizes))
    store.close()


def test_a_group_larger_than_the_bound_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    store = NvmeStore(tmp_path, CPU, 2 * BLOCK, chunk=CHUNK)
    regions = [store.allocate(name, 50_000, torch.float32) for name in ("master", "exp_avg", "exp_avg_sq")]
    coming = [region.read_start() for region in regions]
    coming[0].wait(), coming[1].wait()
    with pytest.raises(OffloadError, match=r"exp_avg_sq \(200000 bytes\).* all of the \d+ bytes; raise zero.host_mem"):
        coming[2].wait()
    for region in regions[:2]:
        region.release()
    store.drain()
    assert regions[2].read_start().wait().eq(0).all(), "what was refused is not asked for any more"
    with pytest.raises(
        OffloadError, match=r"^big is swapped as a whole and takes \d+ bytes.*raise zero.host_memory_mb"
    ):
        store.allocate("big", 500_000, torch.float32)
    store.close()


def test_a_small_read_is_not_held_up_by_a_large_one_that_cannot_start(tmp_path: Path) -> None:
    store = NvmeStore(tmp_path, CPU, 2 * BLOCK, chunk=CHUNK)
    held, large, small = (store.allocate(str(n), n, torch.float32) for n in (50_000, 60_000, 1000))
    held.read_start().wait()
    waiting = large.read_start()
    small.read_start().wait()
    held.release(), small.release()
    assert waiting.wait().shape == (60_000,)
    store.close()


def test_reads_made_too_early_give_their_buffers_to_one_that_is_waited_for(tmp_path: Path) -> None:
    store = NvmeStore(tmp_path, CPU, 3 * BLOCK, chunk=CHUNK)
    regions = [store.allocate(str(i), 50_000, torch.float32) for i in range(6)]
    for i, region in enumerate(regions):
        region.read_start().wait().fill_(i)
        region.write_start()
    coming = [region.read_start() for region in regions]  # the first three are read
    for i in (5, 4, 3):  # the last ones are needed, and stay in use
        assert coming[i].wait().eq(i).all()
    with pytest.raises(OffloadError, match="what is in use at once"):
        coming[0].wait()
    for i in (5, 4, 3):
        regions[i].release()
    for i in (1, 2):
        assert coming[i].wait().eq(i).all()
        regions[i].release()
    store.close()


def test_reads_may_be_dropped_before_they_are_waited_for(tmp_path: Path) -> None:
    store = NvmeStore(tmp_path, CPU, BLOCK, chunk=CHUNK)
    first, second = store.allocate("first", 50_000, torch.float32), store.allocate("second", 50_000, torch.float32)
    first.read_start().wait().fill_(1.0)
    first.write_start()
    first.read_start()
    first.release()
    second.read_start()
    second.release()
    assert first.read_start().wait().eq(1.0).all()
    store.close()


def test_a_read_begins_when_it_is_asked_for_and_not_when_it_is_waited_for(tmp_path: Path) -> None:
    store = NvmeStore(tmp_path, CPU, 2 * BLOCK, chunk=CHUNK)
    region = store.allocate("first", 50_000, torch.float32)
    coming = region.read_start()
    store.drain()
    assert region.phase is Phase.READY and coming.wait().eq(0).all()
    region.release()
    assert len(store._blocks._idle) == 1
    store.allocate("read ahead", 40_000, torch.float32).read_start()
    store.drain()
    buffers = [block.host for block in store._blocks._made]
    store.close()
    assert not store._blocks._idle and len(buffers) == 1, "no buffer outlives the store"
    assert all(buffer is not None and buffer.tensor.numel() == 0 for buffer in buffers)


def test_each_chunk_is_read_and_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = NvmeStore(tmp_path, CPU, BLOCK, chunk=CHUNK)
    region = store.allocate("first", 50_000, torch.float32)  # 3 chunks and a part of one
    moved: list[tuple[str, int]] = []
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: moved.append(("read", len(to[0]))) or read(fd, to, at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: moved.append(("write", len(data))) or write(fd, data, at))
    region.read_start().wait().fill_(1)
    assert not moved, "zeros that were never written are not read"
    region.write_start()
    region.read_start().wait()
    for kind in ("read", "write"):
        assert sorted(size for what, size in moved if what == kind) == [4096, CHUNK, CHUNK, CHUNK]
    store.close()


def test_calls_out_of_order_are_said_with_the_name(tmp_path: Path) -> None:
    store = NvmeStore(tmp_path, CPU, 3 * BLOCK)
    region = store.allocate("bucket 7", 10, torch.float32)
    for call in (region.write_start, region.release):
        with pytest.raises(RuntimeError, match=r"bucket 7.*(read it first|which is not read)"):
            call()
    region.read_start()
    with pytest.raises(RuntimeError, match=r"bucket 7 is .*first"):
        region.read_start()
    store.close()
    with pytest.raises(RuntimeError, match="closed"):
        store.drain()
    store.close()


def test_no_thread_and_no_file_is_left(tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    store = NvmeStore(tmp_path / "made" / "here", CPU, 3 * BLOCK, chunk=CHUNK)
    check_updates(store, [50_000] * 4, torch.float32, ahead=1)
    assert list((tmp_path / "made" / "here").iterdir()) == [], "the swap file has no name"
    assert set(threading.enumerate()) > threads and open_under(tmp_path) == 1
    store.close()
    assert set(threading.enumerate()) <= threads and open_under(tmp_path) == 0


def open_under(folder: Path) -> int:
    """Open files of this process in ``folder``: others come and go with what pytest and torch have open."""
    opened = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            opened += os.readlink(descriptor).startswith(str(folder))
    return opened


@given(st.lists(st.integers(0, 1000), max_size=50), st.floats(0, 1))
def test_placement_takes_the_share_that_is_asked_for(sizes: list[int], ratio: float) -> None:
    chosen = placement(sizes, ratio)
    taken = sum(size for size, there in zip(sizes, chosen) if there)
    assert abs(taken - ratio * sum(sizes)) <= max(sizes, default=0) / 2 + 1e-9


def test_placement_spreads_what_it_takes() -> None:
    assert placement([10] * 8, 0.5) == (False, True) * 4 or placement([10] * 8, 0.5) == (True, False) * 4
    assert placement([10] * 4, 1.0) == (True,) * 4 and placement([10] * 4, 0.0) == (False,) * 4


class Noted:
    """A region that notes what became of each use."""

    name, numel, dtype, tensor = "noted", 3, torch.float32, None

    def __init__(self) -> None:
        self.uses: list[str] = []

    def read_start(self) -> Pending:
        self.uses.append("read")
        return Pending(torch.zeros(3))

    def write_start(self) -> None:
        self.uses.append("written")

    def release(self) -> None:
        self.uses.append("dropped")


def test_a_region_is_written_once_where_any_of_its_nested_uses_has_changed_it() -> None:
    access, wanted = RegionAccess(region := Noted()), list[str]()
    for outer, inner in ((True, False), (False, True), (False, False)):
        assert access.acquire() is access.acquire()
        access.release(changed=inner)
        assert len(region.uses) == len(wanted) + 1, "the outer use goes on"
        access.release(changed=outer)
        wanted += ["read", "written" if outer or inner else "dropped"]
        assert region.uses == wanted
