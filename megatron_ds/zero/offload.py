"""Which store each bucket's state and parameters live in, from the settings of offload."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_ds.config import OffloadConfig, ZeroConfig
from megatron_ds.zero.buckets import BucketLayout, ParameterInfo, bytes_report, state_dtype
from megatron_ds.zero.store import BucketStores, DeviceStore, Store, create_store, placement
from megatron_ds.zero.store.blocks import BlockPool

_OVERLAP = 3  # regions in staging: one is read, one updated, one written
_PLACES = (("none", "device"), ("cpu", "host"), ("nvme", "disk"))


class OffloadPlan:
    """What of which bucket is offloaded, and the staging memory of it: arithmetic, nothing is made.

    With ``host_memory_mb`` set, staging buffers of disk stores get what host-resident state leaves of it.

    Attributes:
        staging: host bytes that the staging buffers of the state's and of the parameters' store may take; 0 where it
            is not on a disk. Never less than the largest region needs, even where ``host_memory_mb`` is: that is for
            the check before the run to say.
    """

    def __init__(self, config: ZeroConfig, layouts: Sequence[BucketLayout]):
        self.config = config
        trainable = [layout for layout in layouts if layout.key.trainable]
        units = [layout for layout in layouts if layout.key.unit is not None]
        self.state = self._chosen(config.offload_optimizer, trainable)
        self.parameters = self._chosen(config.offload_parameters, units)
        state = [state_bytes(layout) for layout in trainable if layout in self.state]
        parameters = [parameter_bytes(layout) for layout in units if layout in self.parameters]
        offloads = [(config.offload_optimizer, state), (config.offload_parameters, parameters)]
        resident = sum(sum(sizes) for offload, sizes in offloads if offload.device == "cpu")
        costs = [[BlockPool.cost(size) for size in sizes if offload.device == "nvme"] for offload, sizes in offloads]
        least = [max(each, default=0) for each in costs]
        left = None if config.host_memory_mb is None else max(0, int(config.host_memory_mb * 1e6) - resident)

        def share(needed: int, everything: int) -> int:
            wanted = _OVERLAP * needed if left is None else left * needed // max(sum(least), 1)
            return max(needed, min(wanted, everything))

        self.staging = share(least[0], sum(costs[0])), share(least[1], sum(costs[1]))

    @staticmethod
    def _chosen(offload: OffloadConfig, layouts: Sequence[BucketLayout]) -> set[BucketLayout]:
        if offload.device == "none":
            return set()
        return {x for x, away in zip(layouts, placement([x.size for x in layouts], offload.ratio)) if away}

    @property
    def offloads(self) -> bool:
        """Whether anything is to leave the device, on any rank: one with few buckets may itself keep all of them."""
        return any(o.device != "none" for o in (self.config.offload_optimizer, self.config.offload_parameters))

    def place(self, kind: str, layout: BucketLayout) -> str:
        """Where bytes of a kind (``"parameters"``, ``"optimizer"``, ...) of a bucket are: device, host or disk."""
        away = "none"
        if kind == "parameters" and layout in self.parameters:
            away = self.config.offload_parameters.device
        elif kind in ("master", "optimizer") and layout in self.state:
            away = self.config.offload_optimizer.device
        return dict(_PLACES)[away]

    def bytes_held(
        self, parameters: Sequence[ParameterInfo], layouts: Sequence[BucketLayout]
    ) -> dict[str, dict[str, int]]:
        """The bytes of :func:`megatron_ds.zero.buckets.bytes_report` by kind, then ``device``, ``host``, ``disk``."""
        total: dict[str, dict[str, int]] = {}
        for layout in (None, *layouts):
            of = (parameters, []) if layout is None else ([], [layout])
            for kind, size in bytes_report(*of, self.config.stage).items():
                of_kind = total.setdefault(kind, {"device": 0, "host": 0, "disk": 0})
                of_kind["device" if layout is None else self.place(kind, layout)] += size
        return total


class Stores:
    """The stores of one optimizer. On the meta device there are none, whatever the plan: nothing holds anything."""

    def __init__(self, plan: OffloadPlan, device: torch.device):
        self.plan = plan
        self._device = DeviceStore(device)

        def make(offload: OffloadConfig, chosen: set[BucketLayout], staging: int) -> Store:
            if device.type == "meta" or offload.device == "none" or not chosen:
                return self._device
            return create_store(offload, device, staging)

        self._state = make(plan.config.offload_optimizer, plan.state, plan.staging[0])
        self._parameters = make(plan.config.offload_parameters, plan.parameters, plan.staging[1])

    def of(self, layout: BucketLayout) -> BucketStores:
        return BucketStores(
            self._state if layout in self.plan.state else self._device,
            self._parameters if layout in self.plan.parameters else None,
        )

    def drain(self) -> None:
        """Wait for everything under way; raise what failed."""
        self._state.drain()
        self._parameters.drain()

    def close(self) -> None:
        self._state.close()
        self._parameters.close()


def state_bytes(layout: BucketLayout) -> int:
    """Bytes of a bucket's master weights and optimizer state on one rank."""
    wide = state_dtype(layout.key.dtype)
    return (len(layout.key.rule.kinds) + (wide != layout.key.dtype)) * layout.shard_size * wide.itemsize


def parameter_bytes(layout: BucketLayout) -> int:
    """Bytes of a unit's bucket of parameters on one rank."""
    return layout.shard_size * layout.key.dtype.itemsize
