"""The flat memory of a rank, made once from its layout: the axes it is cut over, stores and buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from megatron_ds.comm.buffers import Buffers, BufferSizes, GroupBuffers, Slots, open_buffers
from megatron_ds.comm.quantized_buffers import Quantization, QuantizedBuffers
from megatron_ds.config import OffloadConfig, ZeroConfig
from megatron_ds.mesh import Axis, Mesh
from megatron_ds.optim.rule import UpdateRule
from megatron_ds.zero.buckets import state_dtype
from megatron_ds.zero.flat import FlatBucket
from megatron_ds.zero.layout import ZeroLayout
from megatron_ds.zero.nodes import AxisSizes, node_size
from megatron_ds.zero.store import BucketStores, DeviceStore, HostStore, NvmeStore, Store


def data_axes(mesh: Mesh, config: ZeroConfig) -> dict[tuple[str, ...], tuple[Axis, Axis]]:
    """:func:`shard_axes` by the axes over which a parameter is sharded already. Collective: makes all of a mesh's."""
    kinds: list[tuple[str, ...]] = [(), ("ep",)] if mesh.shape.ep > 1 else [()]
    return {over: shard_axes(mesh, config, over) for over in kinds}


def shard_axes(mesh: Mesh, config: ZeroConfig, sharded_over: tuple[str, ...] = ()) -> tuple[Axis, Axis]:
    """The shard and the replicate axis of parameters that are sharded over ``sharded_over`` already.

    Their product is what those leave of ``mesh.data``. Collective if ``config.shard_size`` is set.
    """
    data = mesh.data_besides(sharded_over)
    if config.stage == 0:
        return Axis("shard", ranks=(mesh.rank,)), data
    if config.shard_size is not None and config.shard_size < data.size:
        return mesh.split_data(config.shard_size, sharded_over)
    return data, Axis("replicate", ranks=(mesh.rank,))


class Stores:
    """The stores of one optimizer. On the meta device there are none, whatever the layout: nothing holds anything.

    Raises:
        OffloadError: the folder of the swap files cannot be used.
    """

    def __init__(self, layout: ZeroLayout, device: torch.device):
        self._offload = layout.offload
        self._device = DeviceStore(device)

        def make(offload: OffloadConfig, chosen: frozenset[int], staging: int) -> Store:
            if device.type == "meta" or offload.device == "none" or not chosen:
                return self._device
            if offload.device == "cpu":
                return HostStore(device, offload.pin_memory)
            assert offload.path is not None
            return NvmeStore(offload.path, device, staging, offload.pin_memory)

        placed, config = layout.offload, layout.config
        self._state = make(config.offload_optimizer, placed.state, placed.staging[0])
        self._parameters = make(config.offload_parameters, placed.parameters, placed.staging[1])

    def of(self, bucket: int) -> BucketStores:
        """Of the bucket with that number."""
        return BucketStores(
            self._state if bucket in self._offload.state else self._device,
            self._parameters if bucket in self._offload.parameters else None,
        )

    def drain(self) -> None:
        """Wait for everything under way; raise what failed."""
        self._state.drain()
        self._parameters.drain()

    def close(self) -> None:
        self._state.close()
        self._parameters.close()


def quantization(mesh: Mesh, config: ZeroConfig, axes: AxisSizes) -> dict[tuple[str, ...], Quantization]:
    """How weights and gradients are sent, by the axes over which they are sharded already; empty: as they are.

    Collective if ``config.secondary_size`` is set.
    """
    weights, gradients = (None if f == "none" else f for f in (config.quantized_weights, config.quantized_gradients))
    if weights is None and gradients is None and config.secondary_size is None:
        return {}
    sizes = {over: node_size(config, axes, over) for over in axes}
    nodes = {over: None if size is None else mesh.split_data(size, over) for over, size in sizes.items()}
    return {over: Quantization(weights, gradients, config.quantized_stochastic, node) for over, node in nodes.items()}


class RankMemory:
    """The memory of one rank from which its buckets take theirs.

    Args:
        shards: the shard axis of each ``sharded_over``.
        share: let CPU ranks of one host read each other's parameters and gradients.
        how: of each ``sharded_over``, these are sent, if not as they are; then nothing is shared, so that the numbers
            are those of any hosts.

    Attributes:
        buffers: of each ``sharded_over``, for parameters and gradients.
    """

    def __init__(
        self,
        layout: ZeroLayout,
        device: torch.device,
        shards: Mapping[tuple[str, ...], Axis],
        share: bool,
        how: Mapping[tuple[str, ...], Quantization],
    ):
        self._layout, self._how = layout, how
        self.stores = Stores(layout, device)
        self.buffers: dict[tuple[str, ...], Buffers] = {}
        for over, axis in shards.items():
            if over in how:
                self.buffers[over] = QuantizedBuffers(axis, device, how[over])
            elif share:
                self.buffers[over] = open_buffers(axis, device, buffer_sizes(layout, over))
            else:
                self.buffers[over] = GroupBuffers(axis, device)
        sizes = layout.gradient_sizes() if layout.frees_gradients else {}
        self._slots = {
            (dtype, over): self.buffers[over].slots(len(each), max(each), dtype)
            for (dtype, over), each in sizes.items()
        }

    def buckets(
        self,
        parameters: Sequence[nn.Parameter],
        mesh: Mesh,
        axes: Mapping[tuple[str, ...], tuple[Axis, Axis]],
        shared_over: Sequence[tuple[nn.Parameter, Axis]],
        rule: UpdateRule,
    ) -> list[FlatBucket]:
        """The buckets of the layout over ``parameters``, all that it was made for; see :class:`ZeroOptimizer`."""
        found = []
        for number, layout in enumerate(self._layout.buckets):
            key = layout.key
            also_over = [mesh.axis(name) for name in key.reduce_over]
            if key.shared is not None:
                also_over.append(shared_over[key.shared][1])
            mine = [parameters[slot.parameter] for slot in layout.slots]
            memory = self.buffers[key.sharded_over], self.slots(key.dtype, key.sharded_over), self.stores.of(number)
            how = self._how.get(key.sharded_over)
            found.append(FlatBucket(layout, mine, axes[key.sharded_over], also_over, rule, *memory, how))
        return found

    def slots(self, dtype: torch.dtype, sharded_over: tuple[str, ...]) -> Slots | None:
        """Where whole gradients of parameters of that dtype lie while they are filled; None: they are kept."""
        return self._slots.get((state_dtype(dtype), sharded_over))


def buffer_sizes(layout: ZeroLayout, over: tuple[str, ...]) -> BufferSizes:
    """What will be taken for the buckets that are sharded over these axes already."""
    sizes = BufferSizes(window=layout.gradient_window)
    for number, bucket in enumerate(layout.buckets):
        if bucket.key.sharded_over != over:
            continue
        if number not in layout.offload.parameters:
            kind = sizes.whole if bucket.key.unit is None else sizes.gathered
            kind += [(bucket.size, torch.uint8)] * bucket.codes or [(bucket.size, bucket.key.dtype)]
        if bucket.key.trainable and not layout.frees_gradients:
            sizes.whole.append((bucket.size, state_dtype(bucket.key.dtype)))
    for (dtype, sharded_over), each in layout.gradient_sizes().items() if layout.frees_gradients else ():
        if sharded_over == over:
            sizes.slots.append((len(each), max(each), dtype))
    return sizes


def take_values(buckets: Iterable[FlatBucket], fill: Callable[[list[nn.Parameter]], None] | None) -> None:
    """Parameters become views of their buckets, with the values they had or those that ``fill`` gives them."""
    units: dict[int | None, list[FlatBucket]] = {}
    for bucket in buckets:
        units.setdefault(bucket.layout.key.unit, []).append(bucket)
    if fill is None:
        for bucket in buckets:
            bucket.adopt_values()
        return
    # What is whole all the time is there first: a unit's module may set its small parameters along with its large.
    for bucket in units.get(None, []):
        bucket.view_parameters()
    for unit in sorted(units, key=lambda unit: (unit is None, unit or 0)):
        for bucket in units[unit]:
            if unit is not None:
                bucket.view_parameters()
        fill([parameter for bucket in units[unit] for parameter in bucket.tensors])
        if unit is not None:
            _write_back(units[unit])
    _write_back(units.get(None, []))


def _write_back(buckets: Sequence[FlatBucket]) -> None:
    for bucket in buckets:
        bucket.write_back_initial()
