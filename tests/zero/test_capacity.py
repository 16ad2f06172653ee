"""An offloading optimizer checks capacity before it allocates: all ranks refuse alike, a dry run makes no file."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_disk import small_disk
from torch import nn

from megatron_ds.config import OffloadConfig, OptimizerConfig, ZeroConfig
from megatron_ds.errors import ConfigError
from megatron_ds.mesh import Axis, Mesh, MeshShape
from megatron_ds.shard import ShardSpec
from megatron_ds.testing import run_ranks
from megatron_ds.zero import capacity
from megatron_ds.zero import optimizer as optimizer_module
from megatron_ds.zero.byte_table import RankBytes
from megatron_ds.zero.capacity import Available
from megatron_ds.zero.optimizer import ZeroOptimizer

ELEMENTS = 1 << 18


def parameter(device: str = "cpu") -> nn.Parameter:
    weight = nn.Parameter(torch.zeros(ELEMENTS, dtype=torch.bfloat16, device=device))
    weight.shard = ShardSpec("w", (ELEMENTS,))  # type: ignore[attr-defined]
    return weight


def build(zero: ZeroConfig, device: str = "cpu") -> ZeroOptimizer:
    world = dist.get_world_size() if dist.is_initialized() else 1
    mesh = Mesh.create(MeshShape(dp=world), torch.device("cpu"))
    return ZeroOptimizer([parameter(device)], mesh, zero, OptimizerConfig())


def offload(device: str, path: str | None = None, **rest: Any) -> ZeroConfig:
    return ZeroConfig(offload_optimizer=OffloadConfig(device=device, path=path), **rest)


def refused_by(hosts: dict[int, int], free: dict[int, int]) -> tuple[str, int]:
    """The error of this rank, and how much the optimizer had allocated by then. ``free`` bytes, by host."""
    rank, allocated = dist.get_rank(), []
    patch = pytest.MonkeyPatch()
    patch.setattr(capacity, "_node", lambda: hosts[rank])
    patch.setattr(capacity, "probe", lambda zero, device: Available(host=free[rank]))
    patch.setattr(optimizer_module, "RankMemory", lambda *a, **k: allocated.append(a))
    patch.setattr(optimizer_module, "FlatBucket", lambda *a, **k: allocated.append(a))
    with pytest.raises(ConfigError) as refused:
        build(offload("cpu"))
    patch.undo()
    return str(refused.value), len(allocated)


def test_all_ranks_raise_what_one_nodes_ranks_find() -> None:
    """Ranks 0 and 1 on a node with room, 2 and 3 on one without: 4 ranks hold a quarter of 12 bytes an element each,
    and 6 of parameters and gradients, of which the 2 that are there already count as free."""
    hosts = {0: 1, 1: 1, 2: 2, 3: 2}
    needed = 2 * (6 + 12 // 4) * ELEMENTS
    free = needed - 2 * 2 * ELEMENTS
    roomy = dict.fromkeys((0, 1), 10 * needed)
    results = run_ranks(refused_by, 4, hosts, {**roomy, 2: free - 1, 3: free - 1})
    assert len({text for text, _ in results}) == 1
    assert results[0][0].startswith("rank 2, 3: 2 rank(s) on this node need 4.72 MB of host memory")
    assert [count for _, count in results] == [0] * 4


def there_is_room(free: int) -> int:
    patch = pytest.MonkeyPatch()
    patch.setattr(capacity, "probe", lambda zero, device: Available(host=free))
    zero = build(offload("cpu"))
    patch.undo()
    return sum(zero.bytes_by_store()["optimizer"].values())


def test_just_enough_is_enough() -> None:
    """One byte less is refused above; two ranks of this host are counted as two."""
    needed = 2 * (6 + 12 // 2) * ELEMENTS
    assert run_ranks(there_is_room, 2, needed - 2 * 2 * ELEMENTS) == [4 * ELEMENTS] * 2


def test_a_bound_too_small_for_one_region_says_which_is_enough(tmp_path: Path) -> None:
    """The number in the message is then accepted, and the swap file is there and as large as said."""
    with pytest.raises(ConfigError, match=r"more than zero.host_memory_mb=1; set it to (\d+)") as refused:
        build(offload("nvme", str(tmp_path), host_memory_mb=1))
    assert list(tmp_path.iterdir()) == []
    enough = int(str(refused.value).split("set it to ")[1].split()[0].rstrip(",;"))
    zero = build(offload("nvme", str(tmp_path), host_memory_mb=enough))
    assert zero.bytes_by_store()["optimizer"] == {"device": 0, "host": 0, "disk": 8 * ELEMENTS}
    zero.close()


def test_without_offload_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "probe", lambda *_: pytest.fail("probed"))
    build(ZeroConfig())


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_on_the_meta_device_nothing_is_probed_or_made(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "probe", lambda *_: pytest.fail("probed"))
    path = str(tmp_path / "swap") if device == "nvme" else None
    zero = build(offload(device, path), "meta")
    place = {"cpu": "host", "nvme": "disk"}[device]
    assert zero.bytes_by_store()["master"][place] == 4 * ELEMENTS
    assert list(tmp_path.iterdir()) == []
    assert all(bucket.state.acquire()["master"].is_meta for bucket in zero.buckets)


def told(held: list[int]) -> str:
    """What a rank of one node hears whose ranks will hold so many bytes of state in host memory."""
    world = Axis("world", dist.get_rank(), len(held), dist.group.WORLD, tuple(range(len(held))))
    places = {kind: {"device": 0, "host": 0, "disk": 0} for kind in ("parameters", "gradients", "master", "optimizer")}
    places["optimizer"]["host"] = held[world.rank]
    try:
        capacity.check_capacity(RankBytes(places), offload("cpu"), [], torch.device("cpu"), world)
    except ConfigError as error:
        return str(error)
    return ""


def told_of_each(cases: list[list[int]]) -> list[str]:
    patch = pytest.MonkeyPatch()
    patch.setattr(capacity, "probe", lambda zero, device: Available(host=100 * 10**9))
    said = [told(case) for case in cases]
    patch.undo()
    return said


def test_containers_of_one_machine_are_nodes_of_their_own(tmp_path: Path) -> None:
    """Each sees its control group as the root."""
    found = []
    for name, (boot, group, namespace) in {
        "a container": ("1", "0::/", "cgroup:[1]"),
        "a rank beside it in the same one": ("1", "0::/", "cgroup:[1]"),
        "the next container": ("1", "0::/", "cgroup:[2]"),
        "another group of the first": ("1", "0::/job", "cgroup:[1]"),
        "another machine": ("2", "0::/", "cgroup:[1]"),
    }.items():
        (tmp_path / name / "sys/kernel/random").mkdir(parents=True)
        (tmp_path / name / "self/ns").mkdir(parents=True)
        (tmp_path / name / "sys/kernel/random/boot_id").write_text(boot)
        (tmp_path / name / "self/cgroup").write_text(group)
        (tmp_path / name / "self/ns/cgroup").symlink_to(namespace)
        found.append(capacity._node(str(tmp_path / name)))
    assert found[0] == found[1] and len(set(found)) == 4


def test_the_ranks_of_a_node_are_added_up_and_not_taken_for_alike() -> None:
    """Pipeline stages differ: 70 and 20 GB have room in 100, which neither has twice over; 70 and 40 have none."""
    gigabytes = 10**9
    cases = [[70 * gigabytes, 20 * gigabytes], [70 * gigabytes, 40 * gigabytes]]
    for fits, does_not in run_ranks(told_of_each, 2, cases):
        assert fits == ""
        assert does_not.startswith("2 rank(s) on this node need 110.00 GB of host memory, 55.00 GB each")


@contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A real control group below this process's own, whose processes may take ``limit`` bytes of memory together."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" and Path("/sys/fs/cgroup/cgroup.controllers").exists():
            group, name = Path("/sys/fs/cgroup", path.lstrip("/"), f"capacity-{os.getpid()}"), "memory.max"
            break
        if "memory" in controllers.split(","):
            group = Path("/sys/fs/cgroup/memory", path.lstrip("/"), f"capacity-{os.getpid()}")
            name = "memory.limit_in_bytes"
            break
    else:
        pytest.skip("this process is in no control group for memory")
    made = False
    try:
        group.mkdir()
        made = True
        (group / name).write_text(str(limit))
    except OSError as error:
        if made:
            group.rmdir()
        pytest.skip(f"this process may not make a control group with a limit on memory: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def told_in_group(group: Path, cases: list[list[int]]) -> list[str]:
    (group / "cgroup.procs").write_text(str(os.getpid()))
    return [told(case) for case in cases]


def test_the_ranks_of_a_control_group_are_held_to_its_limit_together() -> None:
    """The machine has more: what is free is the group's, and either rank would fit into it alone."""
    megabytes = 10**6
    with control_group(400 * megabytes) as group:
        cases = [[150 * megabytes] * 2, [250 * megabytes] * 2]
        results = run_ranks(told_in_group, 2, group, cases)
    for fits, does_not in results:
        assert fits == ""
        assert "2 rank(s) on this node need 500.00 MB" in does_not.replace("0.50 GB", "500.00 MB"), does_not
        free = re.search(r"but ([\d.]+) GB are free", does_not)
        assert free is not None and 0.2 < float(free[1]) <= 0.4, does_not


def test_a_disk_is_asked_once_for_all_ranks_of_a_node(tmp_path: Path) -> None:
    """Real numbers: half of what the disk has free for each of two ranks, and a little more than that. A slow rank
    does not take for missing what the other has reserved by then."""
    with small_disk(tmp_path, 12) as disk:
        free = shutil.disk_usage(disk).free
        sizes = [free // 2 - 200_000, free // 2 + 200_000]
        for fits, does_not in run_ranks(told_of_disk, 2, str(disk / "swap"), sizes, timeout=30.0):
            assert fits == ""
            assert does_not.startswith("2 rank(s) on this node need ") and f"swap files in {disk}/swap" in does_not
            found = re.search(r"but ([\d.]+) MB are free", does_not)  # less the folder that the first case made
            assert found is not None and float(found[1]) == pytest.approx(free / 1e6, rel=5e-3)


def told_of_disk(folder: str, sizes: list[int]) -> list[str]:
    world = Axis("world", dist.get_rank(), 2, dist.group.WORLD, (0, 1))
    said, patch, probe = [], pytest.MonkeyPatch(), capacity.probe
    patch.setattr(capacity, "probe", lambda *given: (time.sleep(0.1 * world.rank), probe(*given))[1])
    for size in sizes:
        places = {kind: {"device": 0, "host": 0, "disk": 0} for kind in ("parameters", "gradients", "master")}
        held = RankBytes({**places, "optimizer": {"device": 0, "host": 0, "disk": size}})
        try:
            capacity.check_capacity(held, offload("nvme", folder), [], torch.device("cpu"), world)
            said.append("")
        except ConfigError as error:
            said.append(str(error))
        dist.barrier()  # the other rank's reservation is over too
    patch.undo()
    return said
