"""The stores on a GPU that is far behind the host: the order of copies and of compute is kept by events alone.

Nothing here waits for the device before the end: where an event were missing, a copy would meet memory that is not
written yet, or not read yet, and the sums at the end would show it. The tests of one event each hold back the one
stream that the others have to wait for.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from megatron_ds.zero.store import HostStore, NvmeStore, Region, Store
from megatron_ds.zero.store.blocks import BlockPool, HostBlock

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NUMEL = 4_000_000
"""16 MB: a copy takes the bus a third of a millisecond."""
REGIONS, ROUNDS = 5, 4
LAG = 3_000_000
"""Cycles that the device is kept busy with nothing before each update: one to two milliseconds."""
FEW = 1_000_000
LONG = 80_000_000
"""Cycles by which one stream is held back: some 40 ms, in which 4 MB are read from a disk and copied many times."""


def store_of(kind: str, folder: Path, pin: bool = True, blocks: int = 3, numel: int = NUMEL) -> HostStore | NvmeStore:
    device = torch.device("cuda", 0)
    if kind == "nvme":
        return NvmeStore(folder, device, blocks * BlockPool.cost(4 * numel), pin)
    return HostStore(device, pin)


@pytest.mark.parametrize("pin", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("kind", ["cpu", "nvme"])
def test_updates_are_in_order(tmp_path: Path, kind: str, ahead: int, pin: bool) -> None:
    store = store_of(kind, tmp_path, pin)
    regions = [store.allocate(f"region {i}", NUMEL, torch.float32) for i in range(REGIONS)]
    index = torch.arange(NUMEL, device="cuda") % 7.0
    torch.cuda.synchronize()
    for turn in range(ROUNDS):
        coming = [region.read_start() for region in regions[:ahead]]
        for i, region in enumerate(regions):
            if i + ahead < REGIONS:
                coming.append(regions[i + ahead].read_start())
            tensor = coming[i].wait()
            torch.cuda._sleep(LAG)
            tensor.mul_(2.0).add_(index * (i + 1) + turn)
            region.write_start()
    for i, region in enumerate(regions):
        want = torch.zeros_like(index)
        for turn in range(ROUNDS):
            want = want * 2.0 + index * (i + 1) + turn
        tensor = region.read_start().wait()
        torch.cuda._sleep(LAG)
        assert torch.equal(tensor, want), f"region {i}"
        region.release()
    store.drain()
    store.close()


@pytest.mark.parametrize("kind", ["cpu", "nvme"])
def test_a_block_is_not_filled_again_while_the_device_still_reads_it(tmp_path: Path, kind: str) -> None:
    """Released blocks are taken for the next region at once; what was queued before must see the old one."""
    store = store_of(kind, tmp_path, pin=True)
    regions = [store.allocate(f"region {i}", NUMEL, torch.float32) for i in range(REGIONS)]
    for i, region in enumerate(regions):
        region.read_start().wait().fill_(i + 1.0)
        region.write_start()
    store.drain()
    seen = []
    for region in [*regions, *regions]:
        tensor = region.read_start().wait()
        torch.cuda._sleep(LAG)
        seen.append(tensor.clone())
        region.release()
    for i, tensor in enumerate(seen):
        assert torch.equal(tensor, torch.full_like(tensor, i % REGIONS + 1.0)), f"reading {i}"
    store.close()


def filled(store: Store, *values: float) -> list[Region]:
    """A region of each value, at rest."""
    regions = [store.allocate(f"region {value}", FEW, torch.float32) for value in values]
    for region, value in zip(regions, values):
        region.read_start().wait().fill_(value)
        region.write_start()
        store.drain()
    torch.cuda.synchronize()
    return regions


def hold_back(stream: torch.cuda.Stream | None) -> None:
    assert stream is not None
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)


def up_of(store: HostStore | NvmeStore) -> torch.cuda.Stream:
    assert store._streams is not None
    return store._streams.up


def down_of(store: HostStore | NvmeStore) -> torch.cuda.Stream:
    assert store._streams is not None
    return store._streams.down


def is_all(tensor: torch.Tensor, value: float) -> bool:
    return bool((tensor == value).all())


@pytest.mark.parametrize("kind", ["cpu", "nvme"])
def test_compute_waits_until_a_region_is_loaded(tmp_path: Path, kind: str) -> None:
    store = store_of(kind, tmp_path, blocks=1, numel=FEW)
    first, _ = filled(store, 1.0, 2.0)  # the one block holds the second's values
    hold_back(up_of(store))
    seen = first.read_start().wait().clone()
    first.release()
    assert is_all(seen, 1.0)
    store.close()


@pytest.mark.parametrize("kind", ["cpu", "nvme"])
def test_what_is_taken_back_waits_for_compute(tmp_path: Path, kind: str) -> None:
    store = store_of(kind, tmp_path, numel=FEW)
    (region,) = filled(store, 1.0)
    tensor = region.read_start().wait()
    torch.cuda._sleep(LONG)
    tensor.fill_(2.0)
    region.write_start()
    store.drain()
    assert is_all(region.read_start().wait(), 2.0)
    store.close()


@pytest.mark.parametrize("kind", ["cpu", "nvme"])
def test_a_region_is_read_again_when_it_is_back(tmp_path: Path, kind: str) -> None:
    """Into another block, or that block's own order would do."""
    store = store_of(kind, tmp_path, numel=FEW)
    region, other = filled(store, 1.0, 2.0)
    coming = region.read_start(), other.read_start()
    tensor = coming[0].wait()
    was = tensor.data_ptr()
    assert coming[1].wait().data_ptr() != was
    other.release()
    tensor.fill_(3.0)
    hold_back(down_of(store))
    region.write_start()
    again = region.read_start().wait()
    assert again.data_ptr() != was
    assert is_all(again, 3.0)
    store.close()


@pytest.mark.parametrize("kind", ["cpu", "nvme"])
def test_a_block_is_not_filled_while_it_is_taken_back(tmp_path: Path, kind: str) -> None:
    store = store_of(kind, tmp_path, blocks=1, numel=FEW)
    region, other = filled(store, 1.0, 2.0)
    tensor = region.read_start().wait()
    was = tensor.data_ptr()
    tensor.fill_(3.0)
    hold_back(down_of(store))
    region.write_start()
    second = other.read_start().wait()
    assert second.data_ptr() == was
    seen = second.clone()
    other.release()
    assert is_all(region.read_start().wait(), 3.0) and is_all(seen, 2.0)
    store.close()


def test_a_staging_buffer_is_not_read_into_while_it_is_loaded(tmp_path: Path) -> None:
    store = store_of("nvme", tmp_path, blocks=1, numel=FEW)
    first, second = filled(store, 1.0, 2.0)
    hold_back(up_of(store))
    seen = first.read_start().wait().clone()
    first.release()
    after = second.read_start().wait().clone()
    assert is_all(seen, 1.0) and is_all(after, 2.0)
    store.close()


@pytest.mark.parametrize("kind", ["cpu", "nvme"])
def test_a_new_block_is_not_filled_while_what_had_its_memory_is_in_use(tmp_path: Path, kind: str) -> None:
    """The allocator hands memory out again as soon as it is given back, in the order of the compute stream alone."""
    store = store_of(kind, tmp_path, numel=FEW)
    region = store.allocate("region", FEW, torch.float32)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    activation = torch.full((BlockPool.cost(4 * FEW) // 4 - 1024,), 5.0, device="cuda")
    seen, was = torch.zeros_like(activation), activation.data_ptr()
    torch.cuda._sleep(LONG)
    seen.copy_(activation)
    del activation
    tensor = region.read_start().wait()
    assert tensor.data_ptr() == was, "the test shows nothing: the block has other memory"
    assert is_all(seen, 5.0) and is_all(tensor, 0.0)
    store.close()


def test_memory_of_a_block_is_given_back_when_it_is_loaded() -> None:
    """Of a read that was dropped before it was waited for: whoever gets the memory next writes it on another stream."""
    store = HostStore(torch.device("cuda", 0), staging_bytes=BlockPool.cost(8 * FEW))
    small, large = (store.allocate(name, numel, torch.float32) for name, numel in (("small", FEW), ("large", 2 * FEW)))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    hold_back(up_of(store))
    small.read_start()
    block = store._blocks._made[0]
    assert block.device is not None
    was, size = block.device.data_ptr(), block.size
    keeps_apart = torch.empty(size, dtype=torch.uint8, device="cuda")
    small.release()
    del block
    large.read_start().wait()
    taken = torch.full((size // 4,), 5.0, device="cuda")
    assert taken.data_ptr() == was != keeps_apart.data_ptr(), "the test shows nothing: other memory was taken"
    torch.cuda.synchronize()
    assert is_all(taken, 5.0)
    store.close()


def test_all_of_a_region_is_loaded_whichever_thread_is_last(tmp_path: Path) -> None:
    """The thread that queued the first chunk is slow to say so, and the copies of all others wait for the device."""

    class SlowToSay(torch.cuda.Stream):
        recorded = 0

        def record_event(self, event: torch.cuda.Event | None = None) -> torch.cuda.Event:
            SlowToSay.recorded += 1
            done = super().record_event(event)
            if SlowToSay.recorded == 1:
                torch.cuda._sleep(LONG)
                time.sleep(0.02)
            return done

    device = torch.device("cuda", 0)
    store = NvmeStore(tmp_path, device, BlockPool.cost(4 * FEW), threads=4, chunk=1 << 19)
    first, _ = filled(store, 1.0, 2.0)
    assert store._streams is not None
    store._streams.up = SlowToSay(device)
    seen = first.read_start().wait().clone()
    assert SlowToSay.recorded == 8
    assert is_all(seen, 1.0)
    store.close()


def test_the_host_waits_for_no_copy() -> None:
    """Page-locked memory is what makes copies run behind the host's back."""
    store = HostStore(torch.device("cuda", 0))
    (region,) = filled(store, 1.0)
    hold_back(up_of(store))
    tensor = region.read_start().wait()
    assert not up_of(store).query()
    tensor.add_(1.0)
    region.write_start()
    assert not down_of(store).query() and not torch.cuda.current_stream().query()
    store.drain()
    assert is_all(region.read_start().wait(), 2.0)
    store.close()


def test_page_locked_memory_may_be_forgotten() -> None:
    """Freed or not: memory that stayed registered could not be registered again by the next one who gets it."""
    for turn in range(20):
        block = HostBlock(1 << 22, pin=True)
        if turn % 2:
            block.free()
        del block
