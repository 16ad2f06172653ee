"""What does not fit is refused before the run, with the numbers and with what would fit, which then does."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from megatron_ds.config import ZeroConfig
from megatron_ds.zero.byte_table import RankBytes
from megatron_ds.zero.capacity import (
    Available,
    capacity_faults,
    in_memory,
    probe,
)

GB = 10**9
CPU, NVME = {"device": "cpu"}, {"device": "nvme", "path": "/swap"}


def a_rank(ratio: float, place: str, staging: int = 0, nodes: int = 1) -> RankBytes:
    """2 GB of parameters, 4 of gradients and 12 of state over the ranks of ``nodes`` nodes, ``ratio`` of it away."""

    def split(size: int) -> dict[str, int]:
        size //= nodes
        return {"device": size - round(size * ratio), place: round(size * ratio)}

    held = {"parameters": {"device": 2 * GB}, "gradients": {"device": 4 * GB}}
    return RankBytes({**held, "master": split(4 * GB), "optimizer": split(8 * GB)}, staging)


def only(faults: list[str]) -> str:
    assert len(faults) == 1, faults
    return faults[0]


def test_what_fits_passes() -> None:
    zero = ZeroConfig(offload_optimizer=CPU, host_memory_mb=12_000)
    assert capacity_faults(a_rank(1.0, "host"), 8, Available(host=96 * GB, device=6 * GB), zero) == []
    zero = ZeroConfig(offload_optimizer=NVME, host_memory_mb=100)
    assert capacity_faults(a_rank(1.0, "disk", 10**8), 8, Available(GB, 6 * GB, {"/swap": 96 * GB}), zero) == []


def test_host_memory_counts_every_rank_of_the_node() -> None:
    zero, there = ZeroConfig(offload_optimizer=CPU), Available(host=60 * GB, device=80 * GB)
    fault = only(capacity_faults(a_rank(1.0, "host"), 8, there, zero))
    assert fault == (
        "8 rank(s) on this node need 96.00 GB of host memory, 12.00 GB each (master 4.00 GB, optimizer 8.00 GB), but "
        "60.00 GB are free; use 2 times the nodes, as many ranks on each, or zero.offload_optimizer.ratio=0.625, or "
        "device='nvme'"
    )
    assert capacity_faults(a_rank(0.625, "host"), 8, there, zero) == []
    assert capacity_faults(a_rank(1.0, "host", nodes=2), 8, there, zero) == []


def test_on_a_cpu_the_device_is_the_hosts_memory() -> None:
    fault = only(capacity_faults(a_rank(0.0, "host"), 4, Available(host=40 * GB), ZeroConfig()))
    assert fault.startswith("4 rank(s) on this node need 72.00 GB of host memory, 18.00 GB each (parameters 2.00 GB, ")
    # 24 GB of parameters and gradients stay, so that 48 GB of state have 16.
    assert fault.endswith("are free; use 3 times the nodes, as many ranks on each")
    assert capacity_faults(a_rank(0.0, "host", nodes=3), 4, Available(host=40 * GB), ZeroConfig()) == []
    fault = only(capacity_faults(a_rank(0.0, "host"), 4, Available(host=20 * GB), ZeroConfig()))
    assert fault.endswith("use fewer ranks a node"), "no number of nodes is enough"
    fault = only(capacity_faults(a_rank(0.0, "host"), 4, Available(host=40 * GB), ZeroConfig(shard_size=4)))
    assert fault.endswith("shard over more ranks than zero.shard_size=4")


def test_the_configured_bound() -> None:
    zero = ZeroConfig(offload_optimizer=CPU, host_memory_mb=6000)
    fault = only(capacity_faults(a_rank(1.0, "host"), 1, Available(100 * GB, 100 * GB), zero))
    assert fault == (
        "offload takes 12.00 GB of host memory a rank (master 4.00 GB, optimizer 8.00 GB), more than "
        "zero.host_memory_mb=6000; set it to 12000, or zero.offload_optimizer.ratio=0.5"
    )
    assert capacity_faults(a_rank(0.5, "host"), 1, Available(100 * GB, 100 * GB), zero) == []
    zero = ZeroConfig(offload_optimizer=NVME, host_memory_mb=50)
    fault = only(capacity_faults(a_rank(1.0, "disk", 75_000_000), 1, Available(GB, 100 * GB), zero))
    assert "(staging 75 MB), more than zero.host_memory_mb=50; set it to 75" in fault and "ratio" not in fault


def test_disk_space() -> None:
    zero = ZeroConfig(offload_optimizer=NVME)
    there = Available(GB, 100 * GB, {"/swap": 60 * GB})
    fault = only(capacity_faults(a_rank(1.0, "disk"), 8, there, zero))
    assert fault.startswith("8 rank(s) on this node need 96.00 GB of swap files in /swap, 12.00 GB each")
    assert fault.endswith(
        "but 60.00 GB are free; use 2 times the nodes, as many ranks on each, or zero.offload_optimizer.ratio=0.625"
    )
    both = ZeroConfig(stage=3, offload_optimizer=NVME, offload_parameters={"device": "nvme", "path": "/other"})
    held = {"parameters": {"disk": 2 * GB}, "optimizer": {"disk": 8 * GB}}
    found = capacity_faults(RankBytes(held), 1, Available(GB, GB, {"/swap": 9 * GB, "/other": GB}), both)
    assert "2.00 GB of swap files in /other" in only(found), "each folder has its own files"


def test_device_memory() -> None:
    there = Available(host=500 * GB, device=10 * GB)
    fault = only(capacity_faults(a_rank(0.0, "host"), 8, there, ZeroConfig()))
    assert fault == (
        "a rank keeps 18.00 GB on its device (parameters 2.00 GB, gradients 4.00 GB, master 4.00 GB, optimizer 8.00 "
        "GB), but 10.00 GB are free there; use zero.offload_optimizer.ratio=0.667 with "
        "zero.offload_optimizer.device='cpu', or more ranks"
    )
    assert capacity_faults(a_rank(0.667, "host"), 8, there, ZeroConfig(offload_optimizer={**CPU, "ratio": 0.667})) == []
    fault = only(capacity_faults(a_rank(0.0, "host"), 8, Available(500 * GB, 5 * GB), ZeroConfig()))
    assert fault.endswith("use more ranks, or zero.stage=3")


def test_everything_that_does_not_fit_is_said_at_once() -> None:
    zero = ZeroConfig(offload_optimizer=NVME, host_memory_mb=50)
    faults = capacity_faults(a_rank(1.0, "disk", 10**8), 8, Available(10**8, GB, {"/swap": GB}), zero)
    assert len(faults) == 4


# --- what there is -----------------------------------------------------------------------------------------------


def test_this_machine_can_be_asked(tmp_path: Path) -> None:
    zero = ZeroConfig(offload_optimizer={"device": "nvme", "path": str(tmp_path / "not" / "made" / "yet")})
    total = int(re.findall(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[0]) * 1024
    there = probe(zero, torch.device("cpu"))
    assert 0 < there.host < total and there.device is None
    assert there.disk and list(there.disk) == [zero.offload_optimizer.path] and there.disk.popitem()[1] > 0


def test_a_swap_folder_in_memory_is_advised_against(tmp_path: Path) -> None:
    (tmp_path / "shm").mkdir()
    (tmp_path / "mounts").write_text(f"/dev/a / ext4 rw 0 0\nnone {tmp_path}/shm tmpfs rw 0 0\n")
    advice = in_memory(str(tmp_path / "shm" / "swap"), str(tmp_path / "mounts"))
    assert advice is not None and "is on a tmpfs, which is host memory" in advice
    assert in_memory(str(tmp_path), str(tmp_path / "mounts")) is None
