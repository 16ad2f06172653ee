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
from megatron_ds.host import filesystem, free_host_memory
from megatron_ds.zero.advice import Advice

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


def probe(zero: ZeroConfig, device: torch.device) -> Available:
    """What this node has free now."""
    disk = {folder: shutil.disk_usage(_existing(Path(folder))).free for folder in swap_folders(zero)}
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return Available(free_host_memory(), on_device, disk)


def swap_folders(zero: ZeroConfig) -> list[str]:
    """The folders of all swap files, each once."""
    offloads = (zero.offload_optimizer, zero.offload_parameters)
    return list(dict.fromkeys(offload.path for offload in offloads if offload.device == "nvme" and offload.path))


def swap_bytes(rank: RankBytes, zero: ZeroConfig) -> dict[str, int]:
    """Bytes of one rank's swap files by folder; 0 where this rank keeps all of its few buckets in memory."""
    return {folder: _on_disk(rank, zero, folder) for folder in swap_folders(zero)}


def in_memory(folder: str, mounts: str = "/proc/mounts") -> Advice | None:
    """A folder for swap files that is not on a disk at all."""
    kind = filesystem(_existing(Path(folder)), mounts)
    if kind not in ("tmpfs", "ramfs"):
        return None
    return Advice(
        "swap folder",
        f"the folder for swap files {folder} is on a {kind}, which is host memory: nothing is saved by it",
        "give a folder on a local disk, or use device='cpu'",
    )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _join(*texts: str) -> str:
    return ", ".join(text for text in texts if text)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 or size == 0 else f"{size / 1e6:.3g} MB"
