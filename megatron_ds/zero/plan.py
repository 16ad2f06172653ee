"""What a :class:`~megatron_ds.zero.optimizer.ZeroOptimizer` lays out before it starts: units, shared memory, pools."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from megatron_ds.comm.local.arena import SharedArena
from megatron_ds.config import ZeroConfig
from megatron_ds.mesh import Axis
from megatron_ds.zero.buckets import BucketLayout, state_dtype
from megatron_ds.zero.memory import GradientPool
from megatron_ds.zero.offload import Stores
from megatron_ds.zero.reducer import WINDOW
from megatron_ds.zero.units import find_units


def choose_units(
    config: ZeroConfig, shard: Axis, root: nn.Module | None, classes: Sequence[type[nn.Module]]
) -> dict[nn.Module, list[nn.Parameter]]:
    """The units of stage 3 and what each needs; none at other stages."""
    if config.stage < 3:
        return {}
    if root is None:
        raise ValueError("zero.stage=3 needs root=, the module whose units are gathered and freed")
    if shard.size == 1 and config.offload_parameters.device == "none":
        return {}  # nothing to gather
    return find_units(root, config.persistence_threshold, classes)


def numbers_of_units(
    units: Iterable[Sequence[nn.Parameter]], parameters: Sequence[nn.Parameter], threshold: int
) -> dict[int, int]:
    """The number of the unit of each parameter that is sharded; of several that need it, the first."""
    found: dict[int, int] = {}
    mine = {id(p) for p in parameters}
    for number, needed in enumerate(units):
        for parameter in needed:
            if id(parameter) in mine and parameter.numel() >= max(threshold, 1):
                found.setdefault(id(parameter), number)
    return found


def share_memory(
    config: ZeroConfig,
    layouts: Sequence[BucketLayout],
    parameters: Sequence[nn.Parameter],
    shard: Axis,
    stores: Stores,
) -> SharedArena | None:
    """Memory for parameters and gradients that the ranks of the shard axis share, where they can."""
    if any(parameter.device.type != "cpu" for parameter in parameters):
        return None
    transient = config.stage >= 2
    wanted: list[tuple[int, torch.dtype]] = []
    common: list[tuple[int, torch.dtype]] = []
    passing: list[int] = []  # sizes of what is there for a moment only
    for layout in _ordinary(layouts):
        if stores.of(layout).parameters is None:
            (wanted if layout.key.unit is None else common).append((layout.size, layout.key.dtype))
        if layout.key.trainable and not transient:
            wanted.append((layout.size, state_dtype(layout.key.dtype)))
    kept = SharedArena.bytes_for(wanted)
    for (dtype, _), sizes in _gradient_sizes(_ordinary(layouts)).items() if transient else ():
        slots = [(GradientPool.stride(max(sizes)), dtype)] * len(sizes)
        at_once = WINDOW * config.bucket_mb * 1e6 / (max(sizes) * dtype.itemsize) + 2
        passing.append(SharedArena.bytes_for(slots[: math.ceil(at_once)]))
        wanted += slots
    return SharedArena.create(
        SharedArena.bytes_for(wanted), shard, used=kept + sum(passing), common=SharedArena.bytes_for(common)
    )


_PoolKey = tuple[torch.dtype, tuple[str, ...]]


def gradient_pools(
    layouts: Sequence[BucketLayout],
    device: torch.device,
    shards: Mapping[tuple[str, ...], Axis],
    arena: SharedArena | None,
) -> dict[_PoolKey, GradientPool]:
    """Memory for whole gradients, of each dtype and ``sharded_over`` as many slots as there are buckets.

    ``shards``: the shard axis of each ``sharded_over``. ``arena``: of the ordinary buckets, which have none.
    """
    return {
        (dtype, over): GradientPool(len(sizes), max(sizes), dtype, device, shards[over], None if over else arena)
        for (dtype, over), sizes in _gradient_sizes(layouts).items()
    }


def _ordinary(layouts: Sequence[BucketLayout]) -> list[BucketLayout]:
    """Those that are sharded over the whole data axis, whose ranks may share memory."""
    return [layout for layout in layouts if not layout.key.sharded_over]


def _gradient_sizes(layouts: Sequence[BucketLayout]) -> dict[_PoolKey, list[int]]:
    """Elements of every bucket of gradients, by the dtype in which they are summed and by ``sharded_over``."""
    sizes: dict[_PoolKey, list[int]] = {}
    for layout in layouts:
        if layout.key.trainable:
            sizes.setdefault((state_dtype(layout.key.dtype), layout.key.sharded_over), []).append(layout.size)
    return sizes
