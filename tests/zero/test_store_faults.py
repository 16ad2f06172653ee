"""What can go wrong with swapped state: each is one clear error at the next wait, and nothing hangs or stays behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_disk import largest_file

from megatron_ds.errors import OffloadError
from megatron_ds.files.direct_io import DirectFile
from megatron_ds.testing import RankFailed, run_ranks
from megatron_ds.zero.store import NvmeStore
from megatron_ds.zero.store.blocks import BlockPool

CPU = torch.device("cpu")
CHUNK = 1 << 16
NUMEL = 100_000  # 7 chunks
BLOCK = BlockPool.cost(4 * NUMEL)


def filled(folder: Path, count: int = 2, blocks: int = 3) -> tuple[NvmeStore, list[Any]]:
    """A store with regions 0, 1, ... on disk, region i full of i + 1."""
    store = NvmeStore(folder, CPU, blocks * BLOCK, chunk=CHUNK)
    regions = [store.allocate(f"layers.{i}", NUMEL, torch.float32) for i in range(count)]
    for i, region in enumerate(regions):
        region.read_start().wait().fill_(i + 1)
        region.write_start()
    store.drain()
    return store, regions


@contextmanager
def swap_file(store: NvmeStore) -> Iterator[int]:
    """The nameless file, opened once more and without O_DIRECT, to do harm to."""
    fd = os.open(f"/proc/self/fd/{store._file.fd}", os.O_RDWR)
    yield fd
    os.close(fd)


def close_cleanly(store: NvmeStore) -> None:
    workers = list(store._pool._threads)
    store.close()
    assert not any(thread.is_alive() for thread in workers)


@pytest.mark.parametrize("bit", [0, 8 * 4 * NUMEL - 1, 8 * CHUNK + 5])
def test_a_flipped_bit_is_found(tmp_path: Path, bit: int) -> None:
    store, regions = filled(tmp_path)
    place = regions[1].offset + bit // 8
    with swap_file(store) as fd:
        byte = os.pread(fd, 1, place)[0]
        os.pwrite(fd, bytes([byte ^ 1 << bit % 8]), place)
    assert regions[0].read_start().wait().eq(1).all()
    first = regions[1].offset + bit // 8 // CHUNK * CHUNK
    with pytest.raises(OffloadError) as caught:
        regions[1].read_start().wait()
    text = str(caught.value)
    assert text.startswith(f"offloaded state of layers.1: bytes {first}-"), text
    assert f"swap file {tmp_path}/" in text and "checksum" in text and "last checkpoint" in text
    close_cleanly(store)


def test_a_stale_block_is_found(tmp_path: Path) -> None:
    """A write that the disk acknowledged and lost: the old bytes were right once, with a right checksum."""
    store, regions = filled(tmp_path)
    with swap_file(store) as fd:
        old = os.pread(fd, 4096, regions[0].offset)
        regions[0].read_start().wait().fill_(9)
        regions[0].write_start()
        store.drain()
        os.pwrite(fd, old, regions[0].offset)
    with pytest.raises(OffloadError, match="checksum is not the one"):
        regions[0].read_start().wait()
    close_cleanly(store)


@pytest.mark.parametrize("size", [0, 4096, 4 * NUMEL + CHUNK])
def test_a_short_read_is_found(tmp_path: Path, size: int) -> None:
    store, regions = filled(tmp_path)
    os.ftruncate(store._file.fd, size)
    with pytest.raises(OffloadError, match=r"layers\.1: bytes \d+-\d+ of the swap file .* only \d+ of \d+ came back"):
        regions[1].read_start().wait()
    close_cleanly(store)


def test_a_folder_that_vanishes_does_no_harm(tmp_path: Path) -> None:
    store, regions = filled(tmp_path / "swap")
    shutil.rmtree(tmp_path / "swap")
    for value in (1, 5):
        tensor = regions[0].read_start().wait()
        assert tensor.eq(value).all()
        tensor.fill_(5)
        regions[0].write_start()
    store.drain()
    close_cleanly(store)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, code: int, after: int) -> None:
    """``os.<name>`` fails with ``code`` from call number ``after`` on."""
    real: Callable[..., Any] = getattr(os, name)
    calls = iter(range(1 << 30))

    def fail(*args: Any) -> Any:
        if next(calls) >= after:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, name, fail)


def test_a_disk_that_is_taken_away_is_one_error_at_every_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, regions = filled(tmp_path / "swap", count=4)
    shutil.rmtree(tmp_path / "swap")
    failing(monkeypatch, "preadv", errno.EIO, after=9)
    assert regions[0].read_start().wait().eq(1).all()
    coming = [region.read_start() for region in regions[1:3]]
    for wait in (coming[0].wait, coming[1].wait, coming[1].wait, store.drain):
        with pytest.raises(OffloadError, match=r"layers\.\d: .* cannot be read: Input.* The folder is gone.*last ch"):
            wait()
    close_cleanly(store)


@pytest.mark.parametrize("after", [0, 3, 10])
def test_a_disk_that_fills_up_where_nothing_could_be_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(DirectFile, "reserve", lambda *args: None)
    store = NvmeStore(tmp_path, CPU, 2 * BLOCK, chunk=CHUNK)
    regions = [store.allocate(f"layers.{i}", NUMEL, torch.float32) for i in range(4)]
    failing(monkeypatch, "pwrite", errno.ENOSPC, after)
    with pytest.raises(OffloadError) as caught:
        for region in regions:
            region.read_start().wait().fill_(1)
            region.write_start()
        store.drain()
    text = str(caught.value)
    assert f"layers.{after // 7}" in text and "cannot be written: No space left on device" in text
    assert "this rank's swap file takes 1.61 MB and" in text and "smaller offload ratio" in text
    with pytest.raises(OffloadError):
        store.drain()
    close_cleanly(store)


def test_a_full_disk_is_met_when_the_space_is_reserved(tmp_path: Path) -> None:
    store = NvmeStore(tmp_path, CPU, 3 * BLOCK)
    with largest_file(6 * NUMEL):
        store.allocate("layers.0", NUMEL, torch.float32).read_start().wait()
        with pytest.raises(OffloadError, match=r"layers\.1: bytes 401408-802816 .* cannot be reserved: File too large"):
            store.allocate("layers.1", NUMEL, torch.float32)
    close_cleanly(store)


def test_a_write_that_the_kernel_refuses(tmp_path: Path) -> None:
    store, regions = filled(tmp_path)
    regions[1].read_start().wait()
    with largest_file(6 * NUMEL):
        regions[1].write_start()
        with pytest.raises(OffloadError, match=r"layers\.1: .* cannot be written: File too large"):
            store.drain()
    close_cleanly(store)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OffloadError, match=r"no swap file can be made in .*; give a folder on a local disk"):
            NvmeStore(folder, CPU, BLOCK)


def test_no_memory_for_a_buffer_on_a_worker_is_raised_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, regions = filled(tmp_path, blocks=1)
    regions[0].read_start().wait()
    waiting = regions[1].read_start()

    def take(pool: BlockPool, size: int) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(BlockPool, "take", take)
    regions[0].write_start()
    for wait in (store.drain, waiting.wait):
        with pytest.raises(MemoryError):
            wait()
    close_cleanly(store)


# --- kills, and several ranks ------------------------------------------------------------------------------------


def killed_while_swapping(folder: str, named: bool) -> None:
    if named:
        refuse(os.O_TMPFILE)
    store, regions = filled(Path(folder))
    real = os.pwrite

    def die(fd: int, data: Any, offset: int) -> int:
        real(fd, data, offset)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    os.pwrite = die
    regions[0].read_start().wait()
    regions[0].write_start()
    store.drain()


def refuse(flag: int) -> None:
    """The filesystem does not know this flag of ``open``."""
    real = os.open

    def refusing(path: Any, flags: int, *args: Any) -> int:
        if flags & flag == flag:
            raise OSError(errno.EOPNOTSUPP if flag == os.O_TMPFILE else errno.EINVAL, "refused")
        return real(path, flags, *args)

    os.open = refusing  # type: ignore[assignment]


@pytest.mark.parametrize("named", [False, True])
def test_a_killed_rank_leaves_nothing_and_the_next_one_starts_afresh(tmp_path: Path, named: bool) -> None:
    with pytest.raises(RankFailed, match=f"exit code -{signal.SIGKILL:d}"):
        run_ranks(killed_while_swapping, 1, str(tmp_path), named)
    assert list(tmp_path.iterdir()) == []
    store, regions = filled(tmp_path)
    fresh = store.allocate("fresh", NUMEL, torch.float32)
    assert fresh.read_start().wait().eq(0).all() and regions[1].read_start().wait().eq(2).all()
    close_cleanly(store)


def swap_beside_others(folder: str) -> float:
    refuse(os.O_TMPFILE)  # with names, which must differ
    store, regions = filled(Path(folder))
    regions[0].read_start().wait().fill_(10.0 + dist.get_rank())
    regions[0].write_start()
    store.drain()
    dist.barrier()
    return float(regions[0].read_start().wait().double().mean())


def test_ranks_share_a_folder_and_nothing_else(tmp_path: Path) -> None:
    assert run_ranks(swap_beside_others, 2, str(tmp_path)) == [10.0, 11.0]


# --- direct I/O refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refuse_at", ["open", "transfer"])
def test_a_filesystem_without_direct_io_swaps_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refuse_at: str
) -> None:
    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def transfer(fd: int, *args: Any) -> Any:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(fd, *args)

        return transfer

    if refuse_at == "open":
        monkeypatch.setattr(os, "open", os.open)  # restored afterwards
        refuse(os.O_DIRECT)
    else:
        monkeypatch.setattr(os, "pwrite", refusing(os.pwrite))
        monkeypatch.setattr(os, "preadv", refusing(os.preadv))
    store, regions = filled(tmp_path)
    assert [region.read_start().wait().unique().tolist() for region in regions] == [[1.0], [2.0]]
    assert "refuses direct I/O" in caplog.text and not store._file.direct
    close_cleanly(store)


def test_threads_that_are_refused_at_once_all_fall_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second to be refused finds direct I/O given up already; that must not look like another error."""
    refused, real = threading.Barrier(4, timeout=30.0), os.pwrite

    def pwrite(fd: int, *args: Any) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.wait()
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, *args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    store = NvmeStore(tmp_path, CPU, BLOCK, chunk=CHUNK, threads=4)
    if not store._file.direct:
        pytest.skip(f"{tmp_path} is on a filesystem without direct I/O")
    region = store.allocate("layers.0", CHUNK, torch.float32)  # 4 chunks
    region.read_start().wait().fill_(3)
    region.write_start()
    store.drain()
    assert region.read_start().wait().eq(3).all()
    assert caplog.text.count("refuses direct I/O") == 1
    close_cleanly(store)


def test_direct_io_is_not_given_up_without_need(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, regions = filled(tmp_path)
    if caplog.text:
        probe = DirectFile.create(tmp_path / "probe", 4096)
        probe.finish(10)
        assert not probe.direct, "the filesystem takes direct I/O, but the store gave it up"
    regions[1].read_start().wait()
    close_cleanly(store)
