"""Which store each bucket's state and parameters live in, from the settings of offload."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_ds.config import OffloadConfig, ZeroConfig
from megatron_ds.zero.buckets import BucketLayout, state_dtype
from megatron_ds.zero.flat import BucketStores
from megatron_ds.zero.store import DeviceStore, Store, create_store, placement

_OVERLAP = 3  # regions in staging: one is read, one updated, one written
_BLOCK_WASTE = 8192  # what aligning a staging buffer may cost
_PLACES = (("none", "device"), ("cpu", "host"), ("nvme", "disk"))


class Stores:
    """The stores of one optimizer. On the meta device (a dry run) everything has its place, and no store is made.

    With ``host_memory_mb`` set, staging buffers of disk stores get what host-resident state leaves of it.

    Attributes:
        staging: bytes of host memory that those buffers will come to.
    """

    def __init__(self, config: ZeroConfig, layouts: Sequence[BucketLayout], kinds: Sequence[str], device: torch.device):
        trainable = [layout for layout in layouts if layout.key.trainable]
        units = [layout for layout in layouts if layout.key.unit is not None]
        self._config = config
        self._device = DeviceStore(device)
        self._away_state = self._chosen(config.offload_optimizer, trainable)
        self._away_parameters = self._chosen(config.offload_parameters, units)
        state = [state_bytes(layout, len(kinds)) for layout in trainable if layout in self._away_state]
        parameters = [parameter_bytes(layout) for layout in units if layout in self._away_parameters]
        offloads = [(config.offload_optimizer, state), (config.offload_parameters, parameters)]
        resident = sum(sum(sizes) for offload, sizes in offloads if offload.device == "cpu")
        staged = [max(sizes, default=0) for offload, sizes in offloads if offload.device == "nvme"]
        left = None if config.host_memory_mb is None else max(0, int(config.host_memory_mb * 1e6) - resident)

        self.staging = 0

        def make(offload: OffloadConfig, sizes: Sequence[int]) -> Store:
            if device.type == "meta" or offload.device == "none" or not sizes:
                return self._device
            wanted = _OVERLAP * (max(sizes) + _BLOCK_WASTE)
            share = wanted if left is None else left * max(sizes) // max(sum(staged), 1)
            self.staging += min(wanted, share) if offload.device == "nvme" else 0
            return create_store(offload, device, share)

        self._state = make(*offloads[0])
        self._parameters = make(*offloads[1])

    @staticmethod
    def _chosen(offload: OffloadConfig, layouts: Sequence[BucketLayout]) -> set[BucketLayout]:
        if offload.device == "none":
            return set()
        return {x for x, away in zip(layouts, placement([x.size for x in layouts], offload.ratio)) if away}

    @property
    def offload(self) -> bool:
        """Whether anything is to leave the device, on any rank: one with few buckets may itself keep all of them."""
        return any(o.device != "none" for o in (self._config.offload_optimizer, self._config.offload_parameters))

    def of(self, layout: BucketLayout) -> BucketStores:
        return BucketStores(
            self._state if layout in self._away_state else self._device,
            self._parameters if layout in self._away_parameters else None,
        )

    def place(self, kind: str, layout: BucketLayout) -> str:
        """Where bytes of a kind (``"parameters"``, ``"optimizer"``, ...) of a bucket are: device, host or disk."""
        away = "none"
        if kind == "parameters" and layout in self._away_parameters:
            away = self._config.offload_parameters.device
        elif kind in ("master", "optimizer") and layout in self._away_state:
            away = self._config.offload_optimizer.device
        return dict(_PLACES)[away]

    def drain(self) -> None:
        """Wait for everything under way; raise what failed."""
        self._state.drain()
        self._parameters.drain()

    def close(self) -> None:
        self._state.close()
        self._parameters.close()


def state_bytes(layout: BucketLayout, kinds: int) -> int:
    """Bytes of a bucket's master weights and optimizer state on one rank."""
    wide = state_dtype(layout.key.dtype)
    return (kinds + (wide != layout.key.dtype)) * layout.shard_size * wide.itemsize


def parameter_bytes(layout: BucketLayout) -> int:
    """Bytes of a unit's bucket of parameters on one rank."""
    return layout.shard_size * layout.key.dtype.itemsize
