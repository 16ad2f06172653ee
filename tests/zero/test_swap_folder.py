"""A folder that cannot hold the swap files of one rank is refused on all ranks alike, before anything is allocated."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from small_disk import fill, largest_file, small_disk, used
from test_capacity import ELEMENTS, build, offload

from megatron_ds.config import OffloadConfig, ZeroConfig
from megatron_ds.errors import ConfigError, OffloadError
from megatron_ds.testing import run_ranks
from megatron_ds.zero import allocate
from megatron_ds.zero import optimizer as optimizer_module
from megatron_ds.zero.capacity import SwapReservation
from megatron_ds.zero.store import DeviceStore, HostStore, NvmeStore, Store

STATE = 12 * ELEMENTS
"""Bytes of master weights and AdamW's state over all ranks: 3.1 MB."""

NOBODY = 65534


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write everywhere; without it, permissions count."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def refusal(zero: ZeroConfig, nobody: bool = False) -> str:
    """What this rank is told; empty where it may train. Nothing has been allocated for a run that is refused.

    ``nobody``: this rank has no special rights when it looks at the folder.
    """
    patch, allocated = pytest.MonkeyPatch(), []
    stores, check_capacity = allocate.Stores, optimizer_module.check_capacity

    def look(*given: Any) -> None:
        with as_nobody() if nobody else nullcontext():
            check_capacity(*given)

    patch.setattr(allocate, "Stores", lambda *given: allocated.append(given) or stores(*given))
    patch.setattr(optimizer_module, "check_capacity", look)
    try:
        build(zero).close()
    except ConfigError as error:
        assert not allocated
        return str(error)
    finally:
        patch.undo()
    return ""


def refusal_by_folder(folders: list[str], nobody: int | None = None) -> str:
    """``folders`` by rank, as nodes may differ."""
    rank = dist.get_rank()
    return refusal(offload("nvme", folders[rank]), rank == nobody)


def nodes_differ(bad: Path, good: Path, nobody: int | None = None) -> str:
    """Rank 1 of 3 has the bad folder. What all ranks say, which must be the same."""
    said = run_ranks(refusal_by_folder, 3, [str(good), str(bad), str(good)], nobody, timeout=20.0)
    assert len(set(said)) == 1, said
    assert not good.exists(), "a refused run leaves nothing behind, nor do the ranks that were well"
    return str(said[0])


WAY_OUT = "give a folder on a local disk that this user may write to"


@pytest.mark.parametrize("below", ["", "swap/here"])
def test_a_file_in_the_way(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    bad = tmp_path / "file" / below
    said = nodes_differ(bad, tmp_path / "new" / "deep")
    assert said.startswith(f"rank 1: no swap file can be made in {bad}: it is a file") and said.endswith(WAY_OUT)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Like ``tmp_path``, but others may look into it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["read-only", "closed"])
@pytest.mark.parametrize("there", [False, True])
def test_no_permission(open_folder: Path, mode: int, there: bool) -> None:
    """A parent in which nothing can be made, or that cannot even be asked; and the folder itself being so."""
    closed, good = open_folder / "closed", open_folder / "good"
    bad = closed if there else closed / "swap"
    closed.mkdir()
    closed.chmod(mode)
    try:
        said = nodes_differ(bad, good, nobody=1)
    finally:
        closed.chmod(0o755)
    assert said.startswith("rank 1: ") and str(bad) in said and "Permission denied" in said, said
    assert "on a local disk that this user may" in said


def test_the_first_rank_is_no_exception(open_folder: Path) -> None:
    """It alone looks whether the folder is on a disk at all; what it meets there must not keep it from the verdict."""
    closed = open_folder / "closed"
    closed.mkdir(mode=0o000)
    said = run_ranks(refusal_by_folder, 2, [str(closed / "swap"), str(open_folder / "good")], 0, timeout=20.0)
    assert said[0] == said[1] and said[0].startswith("rank 0: ") and "Permission denied" in said[0]


def test_a_read_only_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path, 12, read_only=True) as disk:
        said = nodes_differ(disk / "swap", tmp_path / "good")
    assert f"no swap file can be made in {disk}/swap: Read-only file system" in said and said.endswith(WAY_OUT)


# --- room that only the kernel can tell -----------------------------------------------------------------------------


def refused_with_limit(folder: str, size: int) -> str:
    with largest_file(size if dist.get_rank() == 1 else resource.RLIM_INFINITY):
        return refusal(offload("nvme", folder))


def test_a_limit_on_one_rank_that_no_look_at_the_disk_shows(tmp_path: Path) -> None:
    """As a quota: there is room enough, but this user may not have it."""
    folder = str(tmp_path / "swap")
    for said in run_ranks(refused_with_limit, 2, folder, STATE // 2 - 4096, timeout=20.0):
        assert said.startswith(
            f"rank 1: {STATE / 2e6:.3g} MB for this rank's swap file in {folder} cannot be reserved: File too large"
        )
        assert "a quota or `ulimit -f` may allow less" in said and "smaller offload ratio" in said
    assert list(tmp_path.iterdir()) == []
    assert run_ranks(refused_with_limit, 2, folder, STATE // 2) == ["", ""]


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_a_disk_with_room_for_one_rank_of_two(tmp_path: Path, kind: str) -> None:
    with small_disk(tmp_path, 12, kind) as disk:
        before = used(disk)
        zero = offload("nvme", str(disk / "swap"))
        assert run_ranks(refusal, 2, zero) == ["", ""]
        fill(disk, leave=STATE * 3 // 4)
        said = run_ranks(refusal, 2, zero, timeout=20.0)
        assert said[0] == said[1], said
        assert said[0].startswith(f"2 rank(s) on this node need {STATE / 1e6:.3g} MB of swap files in {disk}/swap")
        assert " MB are free" in said[0]
        (disk / "fill").unlink()
        assert used(disk) - before <= 8192, "the swap files are gone"


def reserve_all(zero: ZeroConfig, blind: bool) -> str:
    """``blind``: the look at the disk tells of endless room, as where there is a quota."""
    patch = pytest.MonkeyPatch()
    if blind:
        patch.setattr("megatron_ds.zero.capacity.shutil.disk_usage", lambda folder: USAGE)
    try:
        return refusal(zero)
    finally:
        patch.undo()


USAGE = type("Usage", (), {"free": 1 << 50, "used": 0, "total": 1 << 50})()


def test_ranks_reserve_together_what_each_could_have_alone(tmp_path: Path) -> None:
    with small_disk(tmp_path, 12) as disk:
        (disk / "swap").mkdir()
        zero = offload("nvme", str(disk / "swap"))
        fill(disk, leave=STATE * 3 // 4)
        said = run_ranks(reserve_all, 2, zero, True, timeout=20.0)
        assert said[0] == said[1]
        assert "cannot be reserved: No space left on device" in said[0] and "other ranks on that disk" in said[0]
        assert run_ranks(reserve_all, 1, zero, True, timeout=20.0) != [""], "one rank alone holds all of it"
        (disk / "fill").unlink()
        fill(disk, leave=STATE * 5 // 4)
        assert run_ranks(reserve_all, 2, zero, True) == ["", ""]


def test_two_folders_on_one_disk_share_its_room(tmp_path: Path) -> None:
    """Each fits by itself into what is free; the kernel is asked for both."""
    with small_disk(tmp_path, 12) as disk:
        sizes = {str(disk / "a"): 5_000_000, str(disk / "b"): 4_000_000}
        assert max(sizes.values()) < shutil.disk_usage(disk).free < sum(sizes.values())
        assert refused_reservation(sizes).startswith(f"4 MB for this rank's swap file in {disk}/b cannot be reserved")
        assert not (disk / "a").exists() and not (disk / "b").exists()
        assert refused_reservation(dict.fromkeys(sizes, 3_000_000)) == ""


def refused_reservation(sizes: dict[str, int]) -> str:
    reservation = SwapReservation()
    try:
        reservation.acquire(sizes)
    except OffloadError as error:
        return str(error)
    finally:
        reservation.end(keep_folders=False)
    return ""


def test_a_reservation_keeps_what_others_have_put_into_its_folders(tmp_path: Path) -> None:
    reservation = SwapReservation()
    reservation.acquire({str(tmp_path / "a" / "b"): 4096})
    (tmp_path / "a" / "theirs").write_text("")
    reservation.end(keep_folders=False)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["theirs"]


def test_a_run_that_is_let_in_uses_the_folder(tmp_path: Path) -> None:
    zero = build(offload("nvme", str(tmp_path / "swap" / "here")))
    store = zero.stores[0]._state
    assert isinstance(store, NvmeStore) and store._size == STATE and (tmp_path / "swap" / "here").is_dir()
    zero.close()


@pytest.mark.parametrize(("device", "kind"), [("none", DeviceStore), ("cpu", HostStore)])
def test_without_a_folder_the_configuration_names_the_store(device: Any, kind: type[Store]) -> None:
    zero = build(ZeroConfig(stage=1, offload_optimizer=OffloadConfig(device=device)))
    assert type(zero.stores[0]._state) is kind
    zero.close()
