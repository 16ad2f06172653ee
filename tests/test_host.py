"""What the kernel says is left of a machine, control groups included, from files made up for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ds.host import filesystem, free_host_memory


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def system(tmp_path: Path) -> Path:
    write(tmp_path / "proc/meminfo", "MemTotal: 32000000 kB\nMemFree: 1 kB\nMemAvailable:   20000000 kB\n")
    write(tmp_path / "proc/self/cgroup", "0::/job/step\n")
    return tmp_path


def free(system: Path) -> int:
    return free_host_memory(str(system / "proc"), str(system / "cgroup"))


def test_the_kernel_s_own_figure_without_control_groups(system: Path) -> None:
    assert free(system) == 20_000_000 * 1024


def test_the_tightest_control_group_counts_with_its_cache_as_free(system: Path) -> None:
    write(system / "cgroup/job/step/memory.max", "max\n")
    write(system / "cgroup/job/step/memory.current", "5000\n")
    write(system / "cgroup/job/step/memory.stat", "anon 10\ninactive_file 700\n")
    assert free(system) == 20_000_000 * 1024
    write(system / "cgroup/job/memory.max", "9000\n")
    write(system / "cgroup/job/memory.current", "5000\n")
    write(system / "cgroup/job/memory.stat", "anon 10\ninactive_file 700\n")
    assert free(system) == 9000 - 5000 + 700


def test_control_groups_of_the_first_version(system: Path) -> None:
    write(system / "proc/self/cgroup", "12:cpu,cpuacct:/x\n4:memory:/docker/1\n")
    write(system / "cgroup/memory/docker/1/memory.limit_in_bytes", "8000\n")
    write(system / "cgroup/memory/docker/1/memory.usage_in_bytes", "7000\n")
    write(system / "cgroup/memory/docker/1/memory.stat", "total_inactive_file 100\n")
    assert free(system) == 1100


def test_a_folder_is_on_the_innermost_mount(tmp_path: Path) -> None:
    write(tmp_path / "mounts", f"/dev/a / ext4 rw 0 0\nnone {tmp_path}/shm tmpfs rw 0 0\n")
    assert filesystem(tmp_path / "shm" / "swap", str(tmp_path / "mounts")) == "tmpfs"
    assert filesystem(tmp_path / "shmoo", str(tmp_path / "mounts")) == "ext4"
