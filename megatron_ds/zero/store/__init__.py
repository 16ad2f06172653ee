"""Stores: whose memory holds a flat region of state between its uses. Device, host or disk, behind one interface."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_ds.config import OffloadConfig
from megatron_ds.zero.store.base import Region, Store, placement
from megatron_ds.zero.store.device import DeviceStore
from megatron_ds.zero.store.host_memory import HostStore
from megatron_ds.zero.store.nvme import NvmeStore


@dataclass(frozen=True)
class BucketStores:
    """Where a bucket's state lives between uses, and a unit's parameters (None: in device memory)."""

    state: Store
    parameters: Store | None = None


def create_store(offload: OffloadConfig, device: torch.device, host_bytes: int) -> Store:
    """The store that the configuration names; ``host_bytes`` bounds the staging buffers of ``"nvme"``.

    Raises:
        OffloadError: the folder of the swap files cannot be used.
    """
    if offload.device == "nvme":
        assert offload.path is not None
        return NvmeStore(offload.path, device, host_bytes, offload.pin_memory)
    return HostStore(device, offload.pin_memory) if offload.device == "cpu" else DeviceStore(device)
