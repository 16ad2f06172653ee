"""Will it fit? Bytes by store that the ranks of a node need, against what the node has, before the run.

Memory that is over-committed does not raise an error: the kernel kills the process without a word. So what a layout
holds for sure is compared with what is free, and refused with the numbers and what would fit. Activations are not
counted: passing here is needed, not enough.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ds.config import ZeroConfig
from megatron_ds.errors import ConfigError

STATE = ("master", "optimizer")
"""Kinds that ``offload_optimizer`` moves."""


@dataclass(frozen=True)
class Available:
    """Free bytes: ``device`` of a rank's device (None: the device is the host's memory), the rest of the node.

    ``disk``: by folder.
    """

    host: int
    device: int | None = None
    disk: Mapping[str, int] | None = None


@dataclass(frozen=True)
class RankBytes:
    """What one rank needs.

    Attributes:
        held: bytes by kind (``"parameters"``, ``"gradients"``, ``"master"``, ``"optimizer"``) and place
            (``"device"``, ``"host"``, ``"disk"``).
        staging: host memory of transfers, which no ratio makes smaller.
    """

    held: Mapping[str, Mapping[str, int]]
    staging: int = 0

    def total(self, place: str, kinds: Sequence[str] | None = None) -> int:
        return sum(places.get(place, 0) for kind, places in self.held.items() if kinds is None or kind in kinds)

    def parts(self, place: str) -> str:
        found = {kind: places.get(place, 0) for kind, places in self.held.items()}
        if place == "host":
            found["staging"] = self.staging
        return ", ".join(f"{kind} {_gb(size)}" for kind, size in found.items() if size)


def check_budget(rank: RankBytes, ranks: int, there: Available, zero: ZeroConfig) -> None:
    """Raise unless ``ranks`` ranks like this one fit on a node.

    Raises:
        ConfigError: everything that does not fit, each with the numbers and what would.
    """
    faults = budget_faults(rank, ranks, there, zero)
    if faults:
        raise ConfigError("\n".join(faults) if len(faults) == 1 else "".join(f"\n  - {fault}" for fault in faults))


def budget_faults(rank: RankBytes, ranks: int, there: Available, zero: ZeroConfig) -> list[str]:
    """What does not fit, in words. Depends on the arguments alone."""
    faults = []
    on_host = rank.total("host") + rank.staging
    if zero.host_memory_mb is not None and on_host > zero.host_memory_mb * 1e6:
        faults.append(
            f"offload takes {_gb(on_host)} of host memory a rank ({rank.parts('host')}), more than "
            f"zero.host_memory_mb={zero.host_memory_mb:g}; set it to {math.ceil(on_host / 1e6)}"
            + _or_ratio(rank, zero, "host", zero.host_memory_mb * 1e6 - rank.staging)
        )
    in_device = rank.total("device")
    if there.device is None:
        needed = on_host + in_device
        described = f"{_join(rank.parts('device'), rank.parts('host'))}"
    else:
        needed, described = on_host, rank.parts("host")
        if in_device > there.device:
            faults.append(
                f"a rank keeps {_gb(in_device)} on its device ({rank.parts('device')}), but {_gb(there.device)} are "
                f"free there{_relief(rank, zero, in_device - there.device)}"
            )
    if ranks * needed > there.host:
        faults.append(
            f"{ranks} rank(s) on this node need {_gb(ranks * needed)} of host memory, {_gb(needed)} each "
            f"({described}), but {_gb(there.host)} are free"
            + _spread(
                rank, ranks, zero, ("host", "device") if there.device is None else ("host",), there.host, rank.staging
            )
            + _or_ratio(rank, zero, "host", there.host / ranks - (needed - rank.total("host")))
            + (", or device='nvme'" if rank.total("host") else "")
        )
    for folder, free in (there.disk or {}).items():
        here = _on_disk(rank, zero, folder)
        if ranks * here > free:
            faults.append(
                f"{ranks} rank(s) on this node need {_gb(ranks * here)} of swap files in {folder}, {_gb(here)} each "
                f"({rank.parts('disk')}), but {_gb(free)} are free"
                + _spread(rank, ranks, zero, ("disk",), free, 0)
                + _or_ratio(rank, zero, "disk", free / ranks)
            )
    return faults


def _on_disk(rank: RankBytes, zero: ZeroConfig, folder: str) -> int:
    """Bytes of one rank's swap files in this folder; both kinds of offload may use it."""
    size = 0
    for offload, of_state in ((zero.offload_optimizer, True), (zero.offload_parameters, False)):
        if offload.device == "nvme" and offload.path == folder:
            size += sum(places.get("disk", 0) for kind, places in rank.held.items() if (kind in STATE) == of_state)
    return size


def _spread(rank: RankBytes, ranks: int, zero: ZeroConfig, places: Sequence[str], free: int, staging: int) -> str:
    """More nodes with as many ranks each: what is sharded shrinks with them, the rest does not."""
    sharded = (*STATE, *(("gradients",) if zero.stage >= 2 else ()), *(("parameters",) if zero.stage == 3 else ()))
    shrinks = ranks * sum(rank.total(place, sharded) for place in places)
    stays = ranks * (sum(rank.total(place) for place in places) + staging) - shrinks
    if zero.stage == 0 or stays >= free or shrinks == 0:
        return "; use fewer ranks a node"
    if zero.shard_size is not None:
        return f"; shard over more ranks than zero.shard_size={zero.shard_size}"
    return f"; use {-(-shrinks // (free - stays))} times the nodes, as many ranks on each"


def _or_ratio(rank: RankBytes, zero: ZeroConfig, place: str, room: float) -> str:
    """The largest ratio of state at which ``room`` bytes a rank are enough, where there is one."""
    offload, there = zero.offload_optimizer, rank.total(place, STATE)
    room -= rank.total(place) - there
    if there == 0 or room <= 0:
        return ""
    return f", or zero.offload_optimizer.ratio={math.floor(1000 * offload.ratio * room / there) / 1000:g}"


def _relief(rank: RankBytes, zero: ZeroConfig, excess: int) -> str:
    """What takes ``excess`` bytes off the device."""
    offload = zero.offload_optimizer
    state, movable = sum(rank.total(place, STATE) for place in ("device", "host", "disk")), rank.total("device", STATE)
    if zero.stage >= 1 and movable >= excess:
        ratio = math.ceil(1000 * (1 - (movable - excess) / state)) / 1000
        where = "" if offload.device != "none" else " with zero.offload_optimizer.device='cpu'"
        return f"; use zero.offload_optimizer.ratio={ratio:g}{where}, or more ranks"
    return f"; use more ranks{', or zero.stage=3' if zero.stage < 3 else ', or offload parameters too'}"


def probe(zero: ZeroConfig, device: torch.device, proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> Available:
    """What this node has free now.

    Raises:
        ConfigError: a folder for swap files is not on a disk but in memory (tmpfs).
    """
    disk = {}
    for name in ("offload_optimizer", "offload_parameters"):
        offload = getattr(zero, name)
        if offload.device == "nvme":
            folder = _existing(Path(offload.path))
            if filesystem(folder, f"{proc}/mounts") in ("tmpfs", "ramfs"):
                raise ConfigError(
                    f"zero.{name}.path={offload.path} is on a {filesystem(folder, f'{proc}/mounts')}, which is host "
                    f"memory; give a folder on a local disk, or use zero.{name}.device='cpu'"
                )
            disk[offload.path] = shutil.disk_usage(folder).free
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return Available(free_host_memory(proc, cgroups), on_device, disk)


def free_host_memory(proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> int:
    """Bytes that processes here may still take: what the kernel can make free, within every limit of the cgroups."""
    lines = dict(line.split(":", 1) for line in Path(proc, "meminfo").read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    for line in Path(proc, "self/cgroup").read_text().splitlines():
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


def filesystem(folder: Path, mounts: str = "/proc/mounts") -> str:
    """The type of the filesystem that a folder is on."""
    best, kind, path = -1, "", folder.resolve()
    for line in Path(mounts).read_text().splitlines():
        where, found = line.split(" ")[1:3]
        place = Path(where.replace("\\040", " "))
        if path.is_relative_to(place) and len(place.parts) >= best:
            best, kind = len(place.parts), found
    return kind


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _join(*texts: str) -> str:
    return ", ".join(text for text in texts if text)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
