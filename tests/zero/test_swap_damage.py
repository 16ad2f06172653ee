"""A swap file that is changed from outside, cut short or read short is noticed: any byte, either kind of I/O, whole and
partial chunks, in the store and in training."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_store_faults import close_cleanly, swap_file
from torch import nn

from megatron_ds.config import OffloadConfig, OptimizerConfig, ZeroConfig
from megatron_ds.errors import OffloadError
from megatron_ds.files.direct_io import DirectFile
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.shard import ShardSpec
from megatron_ds.zero.optimizer import ZeroOptimizer
from megatron_ds.zero.store import NvmeStore, nvme
from megatron_ds.zero.store.blocks import BlockPool

CPU = torch.device("cpu")
CHUNK = 8192
SIZES = {"whole": 4 * CHUNK, "partial": 3 * CHUNK + 4096 + 20, "small": 8}
"""Bytes of a region: whole chunks, a last one of part of a block, and less than a block."""


@pytest.fixture(params=["direct", "buffered"])
def io(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Swap files are read past the page cache, or through it."""
    if request.param == "buffered":
        monkeypatch.setattr(nvme, "make_swap_file", partial(nvme.make_swap_file, direct=False))
    else:
        file = DirectFile.scratch(tmp_path, "probe")
        file.write(memoryview(bytes(0)), 0)
        if not file.direct:
            pytest.skip(f"{tmp_path} is on a filesystem without direct I/O")
        file.close()
    return str(request.param)


def store_of(folder: Path, sizes: list[int]) -> tuple[NvmeStore, list[Any]]:
    """A store with regions of so many bytes, no two blocks of which are alike."""
    store = NvmeStore(folder, CPU, 3 * BlockPool.cost(max(sizes)), chunk=CHUNK)
    regions = [store.allocate(f"region {i}", size, torch.uint8) for i, size in enumerate(sizes)]
    for i, region in enumerate(regions):
        region.read_start().wait().copy_(content(i, region.size))
        region.write_start()
    store.drain()
    return store, regions


def content(seed: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def flip(store: NvmeStore, place: int, mask: int = 1) -> None:
    with swap_file(store) as fd:
        byte = os.pread(fd, 1, place)[0]
        os.pwrite(fd, bytes([byte ^ mask]), place)


def check_noticed(store: NvmeStore, region: Any, *words: str) -> None:
    with pytest.raises(OffloadError) as caught:
        region.read_start().wait()
    assert all(word in str(caught.value) for word in (region.name, "last checkpoint", *words)), str(caught.value)
    close_cleanly(store)


@pytest.mark.parametrize("kind", SIZES)
def test_any_bit_of_any_region(io: str, tmp_path: Path, kind: str) -> None:
    """And nothing but that region's: what lies beside it, and the rest of its last block, are not its own."""
    sizes, draw = [SIZES["partial"], SIZES[kind], SIZES["whole"]], random.Random(kind)
    for number in range(12):
        store, regions = store_of(tmp_path / str(number), sizes)
        assert store._file.direct == (io == "direct")
        byte = (0, sizes[1] - 1, draw.randrange(sizes[1]))[min(number, 2)]
        flip(store, regions[1].offset + byte, draw.randrange(1, 256))
        for i in (0, 2):
            assert torch.equal(regions[i].read_start().wait(), content(i, sizes[i]))
            regions[i].release()
        first = regions[1].offset + byte // CHUNK * CHUNK
        check_noticed(store, regions[1], "checksum", f"bytes {first}-")


def test_what_follows_a_region_in_its_last_block_does_not_matter(io: str, tmp_path: Path) -> None:
    store, regions = store_of(tmp_path, [SIZES["partial"], SIZES["small"]])
    for region in regions:
        flip(store, region.offset + region.size)
    for i, region in enumerate(regions):
        assert torch.equal(region.read_start().wait(), content(i, region.size))
    close_cleanly(store)


def test_chunks_and_regions_that_change_places(io: str, tmp_path: Path) -> None:
    """Bytes that were written, with a right checksum, somewhere else."""
    for number, (a, b) in enumerate([(0, CHUNK), (0, SIZES["whole"])]):  # within a region, and between two
        store, regions = store_of(tmp_path / str(number), [SIZES["whole"]] * 2)
        with swap_file(store) as fd:
            one, other = os.pread(fd, CHUNK, a), os.pread(fd, CHUNK, b)
            os.pwrite(fd, other, a)
            os.pwrite(fd, one, b)
        check_noticed(store, regions[0], "checksum")


@pytest.mark.parametrize("kind", SIZES)
def test_a_file_cut_short_by_anything(io: str, tmp_path: Path, kind: str) -> None:
    """One byte less of the region is enough; one more may be missing without harm."""
    size = SIZES[kind]
    for number, lost in enumerate((1, min(size, 4096), size)):
        store, (region,) = store_of(tmp_path / str(number), [size])
        os.ftruncate(store._file.fd, size)
        assert torch.equal(region.read_start().wait(), content(0, size))
        region.release()
        os.ftruncate(store._file.fd, size - lost)
        check_noticed(store, region, "cut short: only", "came back")


@pytest.mark.parametrize("got", [0, 1, 4096, CHUNK - 4096, CHUNK - 1])
def test_a_read_that_stays_short_is_an_error(
    io: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, got: int
) -> None:
    """The kernel gives ``got`` bytes of the second chunk, and then none."""
    store, (region,) = store_of(tmp_path, [SIZES["whole"]])
    real = os.preadv

    def preadv(fd: int, buffers: list[Any], offset: int) -> int:
        left = 2 * CHUNK - CHUNK + got - offset if CHUNK <= offset < 2 * CHUNK else len(buffers[0])
        return real(fd, buffers, offset) and min(len(buffers[0]), max(left, 0))

    monkeypatch.setattr(os, "preadv", preadv)
    check_noticed(store, region, f"bytes {CHUNK}-{2 * CHUNK}", f"only {got} of {CHUNK} came back")


@pytest.mark.parametrize("step", [4096, 1000])
def test_a_read_in_parts_is_put_together(io: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Short by whole blocks it may be at any time; by less only where the page cache is read."""
    if io == "direct" and step % 4096:
        pytest.skip("a direct read stops within a block at the end of the file alone")
    store, (region,) = store_of(tmp_path, [SIZES["partial"]])
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:step]], offset))
    assert torch.equal(region.read_start().wait(), content(0, region.size))
    close_cleanly(store)


def test_a_write_in_parts_is_complete(io: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:4096], offset))
    store, (region,) = store_of(tmp_path, [SIZES["partial"]])
    assert torch.equal(region.read_start().wait(), content(0, region.size))
    close_cleanly(store)


# --- in training --------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """``[n, 9]`` to a loss through three units of 81 elements: part of a block of the disk each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(9, 9, bias=False) for _ in range(3))
        for name, parameter in self.named_parameters():
            parameter.shard = ShardSpec(name, tuple(parameter.shape))  # type: ignore[attr-defined]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = torch.tanh(block(inputs))
        return inputs.square().sum()


class Run:
    """A model that trains in this process at stage 3, all of its state and parameters in swap files."""

    def __init__(self, folder: Path):
        offload = OffloadConfig(device="nvme", path=str(folder))
        both = {"offload_optimizer": offload, "offload_parameters": offload}
        self.model = Blocks()
        self.zero = ZeroOptimizer(
            self.model.named_parameters(),
            Mesh.create(MeshShape(), CPU),
            ZeroConfig(stage=3, bucket_mb=0.0006, persistence_threshold=0, **both),
            OptimizerConfig(lr=0.05),
            root=self.model,
        )

    def step(self) -> None:
        self.zero.start_step()
        loss = self.model(torch.ones(4, 9))
        self.zero.start_backward(True)
        loss.backward()
        self.zero.end_backward()
        self.zero.finish_gradients()
        self.zero.step(0.05)
        self.zero.stores[0].drain()

    def regions(self, kind: str) -> list[Any]:
        return [(bucket.state if kind == "state" else bucket.parameters).holding.region for bucket in self.zero.buckets]


@pytest.fixture
def run(io: str, tmp_path: Path) -> Iterator[Callable[[], Run]]:
    runs: list[Run] = []

    def start() -> Run:
        runs.append(Run(tmp_path / "swap"))
        runs[-1].step()
        return runs[-1]

    yield start
    for each in runs:
        each.zero.stores[0].close()  # what the optimizer gathers to close itself cannot be read any more


@pytest.mark.parametrize("kind", ["state", "parameters"])
def test_damage_to_any_region_ends_the_step_that_reads_it(run: Callable[[], Run], kind: str) -> None:
    count = len(run().regions(kind))
    assert count == 3
    for number in range(count):
        for cut in (False, True):
            training = run()
            region = training.regions(kind)[number]
            assert region.checksums[0] is not None
            if cut:
                os.ftruncate(region._store._file.fd, region.offset + region.size - 1)
            else:
                flip(region._store, region.offset + (7 * number) % region.size)
            with pytest.raises(OffloadError, match="cut short" if cut else "checksum"):
                training.step()


@pytest.mark.parametrize("kind", ["state", "parameters"])
def test_a_short_read_ends_the_step(run: Callable[[], Run], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training, real = run(), os.preadv
    fd = training.regions(kind)[0]._store._file.fd

    def short(of: int, buffers: list[Any], offset: int) -> int:
        got = real(of, buffers, offset)
        return got - 4096 * (got // 4096) if of == fd else got

    monkeypatch.setattr(os, "preadv", short)
    with pytest.raises(OffloadError, match="cut short"):
        training.step()
