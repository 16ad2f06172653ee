"""The check before the run that what is offloaded has room: on every node, with one verdict on all ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ds import comm
from megatron_ds.checkpoint.together import exchange, group_device, merged
from megatron_ds.config import ZeroConfig
from megatron_ds.errors import ConfigError, OffloadError
from megatron_ds.mesh import Axis
from megatron_ds.zero.advice import Adviser
from megatron_ds.zero.budget import Available, RankBytes, budget_faults, in_memory, probe, swap_bytes, swap_folders
from megatron_ds.zero.reservation import SwapReservation

_KINDS = ("parameters", "gradients", "master", "optimizer")
_PLACES = ("device", "host", "disk")


log = logging.getLogger(__name__)


def check_capacity(
    rank: RankBytes, zero: ZeroConfig, parameters: Sequence[torch.Tensor], device: torch.device, world: Axis
) -> None:
    """Raise on all ranks unless every node has room for its ranks. Collective over ``world``.

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
        Adviser(log.warning)(in_memory(folder) for folder in swap_folders(zero))
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
        {k: {p: sum(r.held[k][p] for r in node) // len(node) for p in _PLACES} for k in _KINDS},
        sum(r.staging for r in node) // len(node),
    )
    shared = zero.model_copy(update={"host_memory_mb": None})
    return [*budget_faults(rank, 1, own, zero), *budget_faults(mean, len(node), together, shared)]


def _talks(world: Axis) -> bool:
    """Whether there are other ranks: torch's fake group of a dry run has none."""
    return world.group is not None and dist.get_backend(world.group) != "fake"


def _exchange_bytes(rank: RankBytes, resident: int, world: Axis) -> list[tuple[RankBytes, int]]:
    """What every rank of this node will hold, with its parameters' bytes now."""
    if not _talks(world):
        return [(rank, resident)]
    numbers = [_node(), resident, rank.staging, *(rank.held[kind][place] for kind in _KINDS for place in _PLACES)]
    row = torch.tensor([numbers], dtype=torch.int64, device=group_device(world))
    rows: list[list[int]] = comm.gather_dim0(row, world).wait().tolist()
    found = []
    for node, there, staging, *sizes in rows:
        if node == numbers[0]:
            held = {k: dict(zip(_PLACES, sizes[i * len(_PLACES) :])) for i, k in enumerate(_KINDS)}
            found.append((RankBytes(held, staging), there))
    return found


def _node() -> int:
    """Ranks of one machine have its boot in common, and those of one container its control group."""
    own = hashlib.sha256(Path("/proc/sys/kernel/random/boot_id").read_bytes() + Path("/proc/self/cgroup").read_bytes())
    return int.from_bytes(own.digest()[:7], "big")


def _resident(parameters: Sequence[torch.Tensor]) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters if p.is_cpu}
    return sum(storages.values())
