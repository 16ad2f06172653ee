"""The capacity check: does what a rank will hold fit on its device, its node's memory and its disk?

Memory that is over-committed does not raise an error: the kernel kills the process. So what a layout holds for sure is
compared with what is free before anything is allocated, and refused on all ranks alike, with the numbers and what would
fit. Activations are not counted: passing here is needed, not enough.

Disk space is reserved besides (:class:`SwapReservation`), since a quota, a limit on file sizes and two folders on one
disk do not show in what a filesystem says is free.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ds import comm
from megatron_ds.comm.together import exchange, group_device, merged
from megatron_ds.config import ZeroConfig
from megatron_ds.errors import ConfigError, OffloadError
from megatron_ds.files import gb
from megatron_ds.files.direct_io import DirectFile
from megatron_ds.host import filesystem, free_host_memory
from megatron_ds.mesh import Axis
from megatron_ds.zero.byte_table import KINDS, PLACES, STATE, RankBytes
from megatron_ds.zero.store.nvme import make_swap_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Available:
    """Free bytes: ``device`` of a rank's device (None: the device is the host's memory), the rest of the node.

    ``disk``: by folder.
    """

    host: int
    device: int | None = None
    disk: Mapping[str, int] | None = None


def check_capacity(
    rank: RankBytes, zero: ZeroConfig, parameters: Sequence[torch.Tensor], device: torch.device, world: Axis
) -> None:
    """Raise on all ranks unless every node has the capacity for its ranks. Collective over ``world``.

    Args:
        rank: what this rank will hold.
        parameters: as the model was built. On a CPU their memory is given back as the buckets take them over, so that
            it counts as free.

    Raises:
        ConfigError: on every rank, with the ranks whose node, device or folder has no room, or whose folder for swap
            files cannot be used.
    """
    node = _exchange_bytes(rank, _resident(parameters), world)
    # No rank takes anything before this, so that what the others' probes find free is what was.
    _agree(world, lambda: _shortages(rank, zero, device, node, world.is_first))
    reservation, agreed = SwapReservation(), False
    try:
        _agree(world, lambda: reservation.acquire(swap_bytes(rank, zero)))
        agreed = True
    finally:
        reservation.end(keep_folders=agreed)


def _agree(world: Axis, check: Callable[[], None]) -> None:
    """Raise on all ranks what ``check`` raises on any: the others wait for the verdict, whatever this one meets.

    Raises:
        ConfigError: on every rank alike.
    """
    text = ""
    try:
        check()
    except (ConfigError, OffloadError) as error:
        text = str(error)
    except OSError as error:  # a folder that cannot even be asked
        text = f"{error.filename}: {error.strerror}; give folders for swap files on a local disk that this user may use"
    message = merged(exchange(world, text) if _talks(world) else [text])
    if message:
        raise ConfigError(message)


def _shortages(
    rank: RankBytes, zero: ZeroConfig, device: torch.device, node: Sequence[tuple[RankBytes, int]], advises: bool
) -> None:
    """Raise what is short, as far as it can be asked."""
    if advises:
        for folder in swap_folders(zero):
            if warning := in_memory(folder):
                log.warning(warning)
    there = probe(zero, device)
    there = dataclasses.replace(there, host=there.host + sum(resident for _, resident in node))
    faults = _faults(rank, [held for held, _ in node], there, zero)
    if faults:
        raise ConfigError("\n".join(faults))


def _faults(rank: RankBytes, node: Sequence[RankBytes], there: Available, zero: ZeroConfig) -> list[str]:
    """Stages of a pipeline differ: what a rank must keep within is its own, what a node must have is the ranks' sum."""
    own = dataclasses.replace(there, host=1 << 62, disk=None)
    together = dataclasses.replace(there, device=None if there.device is None else 1 << 62)
    mean = RankBytes(
        {k: {p: sum(r.memory[k][p] for r in node) // len(node) for p in PLACES} for k in KINDS},
        sum(r.staging for r in node) // len(node),
    )
    shared = zero.model_copy(update={"host_memory_mb": None})
    return [*capacity_faults(rank, 1, own, zero), *capacity_faults(mean, len(node), together, shared)]


def _talks(world: Axis) -> bool:
    """Whether there are other ranks: torch's fake group of a dry run has none."""
    return world.group is not None and dist.get_backend(world.group) != "fake"


def _exchange_bytes(rank: RankBytes, resident: int, world: Axis) -> list[tuple[RankBytes, int]]:
    """What every rank of this node will hold, with its parameters' bytes now."""
    if not _talks(world):
        return [(rank, resident)]
    numbers = [_node(), resident, rank.staging, *(rank.memory[kind][place] for kind in KINDS for place in PLACES)]
    row = torch.tensor([numbers], dtype=torch.int64, device=group_device(world))
    rows: list[list[int]] = comm.gather_dim0(row, world).wait().tolist()
    found = []
    for node, there, staging, *sizes in rows:
        if node == numbers[0]:
            held = {k: dict(zip(PLACES, sizes[i * len(PLACES) :])) for i, k in enumerate(KINDS)}
            found.append((RankBytes(held, staging), there))
    return found


def _node(proc: str = "/proc") -> int:
    """Ranks of one machine have its boot in common, and those of one container its control group.

    A container sees its group as the root, by the same name as the next one: its namespace tells them apart.
    """
    own = hashlib.sha256(Path(proc, "sys/kernel/random/boot_id").read_bytes())
    own.update(Path(proc, "self/cgroup").read_bytes())
    with contextlib.suppress(OSError):  # a kernel without them
        own.update(os.readlink(Path(proc, "self/ns/cgroup")).encode())
    return int.from_bytes(own.digest()[:7], "big")


def _resident(parameters: Sequence[torch.Tensor]) -> int:
    with torch._C.DisableTorchFunctionSubclass():  # some may be sharded already
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters if p.is_cpu}
    return sum(storages.values())


def capacity_faults(rank: RankBytes, ranks: int, there: Available, zero: ZeroConfig) -> list[str]:
    """What does not fit, in words. Depends on the arguments alone."""
    faults = []
    on_host = rank.total("host") + rank.staging
    if zero.host_memory_mb is not None and on_host > zero.host_memory_mb * 1e6:
        faults.append(
            f"offload takes {gb(on_host)} of host memory a rank ({_parts(rank, 'host')}), more than "
            f"zero.host_memory_mb={zero.host_memory_mb:g}; set it to {math.ceil(on_host / 1e6)}"
            + _or_ratio(rank, zero, "host", zero.host_memory_mb * 1e6 - rank.staging)
        )
    in_device = rank.total("device")
    if there.device is None:
        needed = on_host + in_device
        described = f"{_join(_parts(rank, 'device'), _parts(rank, 'host'))}"
    else:
        needed, described = on_host, _parts(rank, "host")
        if in_device > there.device:
            faults.append(
                f"a rank keeps {gb(in_device)} on its device ({_parts(rank, 'device')}), but {gb(there.device)} are "
                f"free there{_relief(rank, zero, in_device - there.device)}"
            )
    if ranks * needed > there.host:
        faults.append(
            f"{ranks} rank(s) on this node need {gb(ranks * needed)} of host memory, {gb(needed)} each "
            f"({described}), but {gb(there.host)} are free"
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
                f"{ranks} rank(s) on this node need {gb(ranks * here)} of swap files in {folder}, {gb(here)} each "
                f"({_parts(rank, 'disk')}), but {gb(free)} are free"
                + _spread(rank, ranks, zero, ("disk",), free, 0)
                + _or_ratio(rank, zero, "disk", free / ranks)
            )
    return faults


def _parts(rank: RankBytes, place: str) -> str:
    found = {kind: places.get(place, 0) for kind, places in rank.memory.items()}
    if place == "host":
        found["staging"] = rank.staging
    return ", ".join(f"{kind} {gb(size)}" for kind, size in found.items() if size)


def _on_disk(rank: RankBytes, zero: ZeroConfig, folder: str) -> int:
    """Bytes of one rank's swap files in this folder; both kinds of offload may use it."""
    size = 0
    for offload, of_state in ((zero.offload_optimizer, True), (zero.offload_parameters, False)):
        if offload.device == "nvme" and offload.path == folder:
            size += sum(places.get("disk", 0) for kind, places in rank.memory.items() if (kind in STATE) == of_state)
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


def _or_ratio(rank: RankBytes, zero: ZeroConfig, place: str, free: float) -> str:
    """The largest ratio of state at which ``free`` bytes a rank are enough, where there is one."""
    offload, there = zero.offload_optimizer, rank.total(place, STATE)
    free -= rank.total(place) - there
    if there == 0 or free <= 0:
        return ""
    return f", or zero.offload_optimizer.ratio={math.floor(1000 * offload.ratio * free / there) / 1000:g}"


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


def in_memory(folder: str, mounts: str = "/proc/mounts") -> str | None:
    """A folder for swap files that is not on a disk at all."""
    kind = filesystem(_existing(Path(folder)), mounts)
    if kind not in ("tmpfs", "ramfs"):
        return None
    return (
        f"the folder for swap files {folder} is on a {kind}, which is host memory: nothing is saved by it; give a "
        "folder on a local disk, or use device='cpu'"
    )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _join(*texts: str) -> str:
    return ", ".join(text for text in texts if text)


class SwapReservation:
    """Swap files made and filled with reserved space before the run, to learn whether the folder can be used.

    Every rank holds its reservation until all ranks have theirs: what they need together must be there. The store makes
    its own files afterwards. A rank gives its reservation back before it reserves anew, so that never more than the run
    needs is taken, however far the others are.
    """

    def __init__(self) -> None:
        self._files: list[DirectFile] = []
        self._made: list[Path] = []  # folders that were not there, the outermost first

    def acquire(self, sizes: Mapping[str, int]) -> None:
        """Make a file of so many bytes in each folder. Where the filesystem cannot reserve, it stays empty.

        Raises:
            OffloadError: a folder cannot be used, or does not have the room.
        """
        for folder, size in sizes.items():
            path = Path(folder)
            self._made += [each for each in (*reversed(path.absolute().parents), path) if not each.exists()]
            file = make_swap_file(path, direct=False)  # no transfers, so no word on whether they would be direct
            self._files.append(file)
            try:
                file.reserve(0, size)
            except OSError as error:
                raise OffloadError(
                    f"{gb(size)} for this rank's swap file in {folder} cannot be reserved: {error.strerror}; "
                    f"{gb(shutil.disk_usage(folder).free)} are free there now, beside what other ranks on "
                    "that disk have reserved, and a quota or `ulimit -f` may allow less. Make room, or use another "
                    "folder, a smaller offload ratio or more ranks"
                ) from error

    def end(self, keep_folders: bool) -> None:
        """Give the space back. Folders made for the reservation go too, unless they are to be used or others do."""
        while self._files:
            self._files.pop().close()
        while self._made and not keep_folders:
            with contextlib.suppress(OSError):
                self._made.pop().rmdir()
