"""The stores on a GPU that is far behind the host: the order of copies and of compute is kept by events alone.

Nothing here waits for the device before the end: where an event were missing, a copy would meet memory that is not
written yet, or not read yet, and the sums at the end would show it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ds.zero.store import HostStore, NvmeStore, Store
from megatron_ds.zero.store.blocks import BlockPool

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NUMEL = 4_000_000
"""16 MB: a copy takes the bus a third of a millisecond."""
REGIONS, ROUNDS = 5, 4
LAG = 3_000_000
"""Cycles that the device is kept busy with nothing before each update: one to two milliseconds."""


def store_of(kind: str, folder: Path, pin: bool) -> Store:
    device = torch.device("cuda")
    if kind == "nvme":  # many small chunks on several threads
        return NvmeStore(folder, device, 3 * BlockPool.cost(4 * NUMEL), pin, chunk=1 << 18)
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


@pytest.mark.parametrize("kind", ["cpu", "nvme"])
def test_memory_that_queued_work_still_writes_is_not_filled_before(tmp_path: Path, kind: str) -> None:
    """What a freed tensor took is given to the first block while a kernel that writes the tensor is still queued."""
    store = store_of(kind, tmp_path, pin=True)
    region = store.allocate("region", NUMEL, torch.float32)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    size = BlockPool.cost(4 * NUMEL) - 4096  # of the block, so that it gets this very memory
    scratch = torch.empty(size, dtype=torch.uint8, device="cuda")
    place = scratch.data_ptr()
    torch.cuda._sleep(100 * LAG)
    scratch.fill_(7)
    del scratch
    tensor = region.read_start().wait()
    assert tensor.data_ptr() == place
    assert not tensor.any(), "a new region is zeros"
    region.release()
    store.close()
