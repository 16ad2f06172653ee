"""The memory and the files of the machine that this process runs on: what is left, and what the process took."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch


def free_host_memory(proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> int:
    """Bytes that processes here may still take: what the kernel can make free, within every limit of the cgroups."""
    lines = dict(line.split(":", 1) for line in Path(proc, "meminfo").read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    groups = Path(proc, "self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used, cache = Path(cgroups), "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = Path(cgroups, "memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts), -1, -1):
            free = min(free, _left_in_group(root.joinpath(*parts[:depth]), limit, used, cache, free))
    return max(free, 0)


def _left_in_group(folder: Path, limit: str, used: str, cache: str, otherwise: int) -> int:
    """Bytes below a control group's limit; file cache that the kernel would drop counts as free."""
    try:
        most, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return otherwise  # no such controller at this level
    return otherwise if most == "max" else int(most) - taken + int(stat.get(cache, 0))


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: allocated by torch on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: across an exec that keeps the peak of the process before, here the launcher's.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def filesystem(folder: Path, mounts: str = "/proc/mounts") -> str:
    """The type of the filesystem that a folder is on."""
    best, kind, path = -1, "", Path(os.path.realpath(folder))
    for line in Path(mounts).read_text().splitlines():
        where, found = line.split(" ")[1:3]
        place = Path(where.replace("\\040", " "))
        if path.is_relative_to(place) and len(place.parts) >= best:
            best, kind = len(place.parts), found
    return kind
