"""Stores: whose memory holds a flat region of state between its uses. Device, host or disk, behind one interface."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ds.zero.store.base import Region, Store, placement
from megatron_ds.zero.store.device import DeviceStore
from megatron_ds.zero.store.host_memory import HostStore
from megatron_ds.zero.store.nvme import NvmeStore


@dataclass(frozen=True)
class BucketStores:
    """Where a bucket's state lives between uses, and a unit's parameters (None: in device memory)."""

    state: Store
    parameters: Store | None = None
